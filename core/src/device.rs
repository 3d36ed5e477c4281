//! The mode device-aware-weighted: workers with an accelerator and workers without, each group with
//! its share of the requests, as Dynamo 1.6.1 divides them.

use std::borrow::Cow;

use crate::decide::Candidate;
use crate::id::Device;
use crate::policy::Mode;
use crate::table::Pool;

/// The candidates among which the least loaded one is taken: in the mode device-aware-weighted
/// those of one device, in every other mode all.
///
/// Workers without an accelerator are next as long as they have fewer requests than
/// `requests of the others x their number / (device_ratio x number of the others)`, in whole
/// numbers.
#[must_use]
pub fn group<'a>(candidates: &'a [Candidate], pool: &Pool) -> Cow<'a, [Candidate]> {
    if pool.policy.mode != Mode::DeviceAwareWeighted {
        return Cow::Borrowed(candidates);
    }
    let is_cpu = |c: &Candidate| {
        let owner = pool.owners.get(c.owner);
        owner.is_some_and(|owner| owner.traits.device == Device::Cpu)
    };
    let (cpu, others): (Vec<Candidate>, Vec<Candidate>) =
        candidates.iter().copied().partition(is_cpu);
    if cpu.is_empty() || others.is_empty() {
        return Cow::Borrowed(candidates);
    }
    let requests = |group: &[Candidate]| -> u64 {
        let each = group.iter().map(|c| u64::from(c.load.requests()));
        each.sum()
    };
    let ratio = u64::from(pool.device_ratio.max(1));
    let divisor = ratio.saturating_mul(others.len() as u64).max(1);
    let allowed = requests(&others).saturating_mul(cpu.len() as u64) / divisor;
    Cow::Owned(if requests(&cpu) < allowed {
        cpu
    } else {
        others
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::Pace;
    use crate::id::{OwnerId, Role, Slot};
    use crate::load::Load;
    use crate::overlap::Overlap;
    use crate::policy::Policy;
    use crate::table::{Metadata, Owner, Traits};

    /// A pool of workers by device, and candidates with so many requests each.
    fn field(workers: &[(Device, u16)]) -> (Pool, Vec<Candidate>) {
        let owners = (0_u16..).zip(workers).map(|(n, (device, _))| Owner {
            slot: Slot(n),
            id: OwnerId {
                worker: n.into(),
                rank: 0,
            },
            role: Role::Aggregated,
            endpoint: String::new(),
            accepting: true,
            traits: Traits {
                device: *device,
                ..Traits::default()
            },
            metadata: Metadata::default(),
        });
        let pool = Pool {
            owners: owners.collect(),
            policy: Policy {
                mode: Mode::DeviceAwareWeighted,
                ..Policy::default()
            },
            device_ratio: 8,
            ..Pool::default()
        };
        let candidates = workers.iter().enumerate().map(|(owner, (_, requests))| {
            let load = Load {
                decoding: *requests,
                ..Load::default()
            };
            Candidate {
                owner,
                overlap: Overlap::default(),
                load,
                shared_blocks: 0,
                pace: Pace::default(),
                factor: 1.0,
            }
        });
        (pool, candidates.collect())
    }

    fn chosen(workers: &[(Device, u16)]) -> Vec<usize> {
        let (pool, candidates) = field(workers);
        let group = group(&candidates, &pool);
        group.iter().map(|c| c.owner).collect()
    }

    const GPU: Device = Device::Accelerator;
    const CPU: Device = Device::Cpu;

    #[test]
    fn workers_without_accelerator_get_their_share_and_no_more() {
        // 8 x 2 / (8 x 2) = 1 request for the two of them.
        assert_eq!(chosen(&[(GPU, 4), (GPU, 4), (CPU, 0), (CPU, 0)]), [2, 3]);
        assert_eq!(chosen(&[(GPU, 4), (GPU, 4), (CPU, 1), (CPU, 0)]), [0, 1]);
        // 7 x 2 / 16 is less than one.
        assert_eq!(chosen(&[(GPU, 4), (GPU, 3), (CPU, 0), (CPU, 0)]), [0, 1]);
        assert_eq!(chosen(&[(GPU, 0), (CPU, 0)]), [0]);
    }

    #[test]
    fn one_group_alone_and_other_modes_take_all() {
        assert_eq!(chosen(&[(CPU, 4), (CPU, 0)]), [0, 1]);
        assert_eq!(chosen(&[(GPU, 4), (GPU, 0)]), [0, 1]);
        let (mut pool, candidates) = field(&[(GPU, 9), (CPU, 0)]);
        pool.policy.mode = Mode::LeastLoaded;
        assert_eq!(group(&candidates, &pool).len(), 2);
    }

    #[test]
    fn requests_settle_at_the_ratio() {
        let mut workers = [(GPU, 0), (GPU, 0), (CPU, 0)];
        for _ in 0..170 {
            let group = chosen(&workers);
            let least = group.into_iter().min_by_key(|i| workers[*i].1).unwrap();
            workers[least].1 += 1;
        }
        assert_eq!(workers.map(|(_, n)| n), [80, 80, 10]);
    }
}
