//! What proxies are told of the load.

use kv_core::loads::{PoolLoads, WriteOff};

use super::correction::Passing;
use super::proxy::Told;
use super::{Accounts, correction, prefix};

/// How long a correction of blocks has to last where one proxy alone books: its lanes are right by
/// themselves. Where others book too, what they have booked is worth more at once.
pub(super) const LASTING_ALONE_MS: u64 = 150;
/// How long nobody else must have booked anything for that.
const ALONE_MS: u64 = 2_000;

/// What a proxy is to be told.
#[derive(Clone, Debug, PartialEq)]
pub struct News {
    /// The subscription that serves it.
    pub stream: u64,
    /// By position of the pool in the table.
    pub pools: Vec<PoolLoads>,
    /// What one of its VMs is to take out of the lanes.
    pub write_off: WriteOff,
    /// By pool, the classes in which requests wait, as bits.
    pub backlogs: Vec<u64>,
    /// Whether no other proxy is connected or has booked anything for a while, and nothing is
    /// predicted from bookings.
    pub is_alone: bool,
}

impl Accounts {
    /// What is to be told to proxies whose corrections or live prefixes have changed.
    pub fn news(&mut self, now_ms: u64) -> Vec<News> {
        let mut news = Vec::new();
        let may_wait = self.proxies.len() == 1 && !self.predicts;
        self.is_unsettled = false;
        for proxy in self.proxies.values_mut() {
            let Some(stream) = proxy.stream else { continue };
            let own = proxy.known_vms();
            // What others had booked is to be taken back at once, too.
            let mut bookings = self.tracker.bookings();
            if bookings.any(|(id, ..)| !own.contains(&id.source)) {
                proxy.crowded_ms = Some(now_ms);
            }
            let is_alone = proxy
                .crowded_ms
                .is_none_or(|at| now_ms.saturating_sub(at) >= ALONE_MS);
            let is_right = proxy.knows_its_own && self.counts_distinct && is_alone;
            let last_ms = match proxy.told {
                Some(_) if is_right => LASTING_ALONE_MS,
                _ => 0,
            };
            let mut prefixes = prefix::live(&self.tracker, &self.owners, &own).into_iter();
            proxy
                .passing
                .resize_with(self.owners.len(), Passing::default);
            let told = proxy.told.iter().flat_map(|told| &told.pools);
            let told = told.map(|pool| &pool.corrections[..]);
            let mut told = told.chain(std::iter::repeat(&[][..]));
            let mut pools = Vec::new();
            for ((pool, owners), passing) in (0..).zip(&self.owners).zip(&mut proxy.passing) {
                let found = correction::of(&self.tracker, &proxy.ledger, pool, owners);
                let told = told.next().unwrap_or_default();
                let corrections = passing.lasting(&found, told, owners, (last_ms, now_ms));
                self.is_unsettled |= corrections != found;
                pools.push(PoolLoads {
                    corrections,
                    prefixes: prefixes.next().unwrap_or_default(),
                });
            }
            let told = Told {
                pools,
                write_off: proxy.write_off.clone(),
                backlogs: self.backlogs.clone(),
                is_alone: is_alone && may_wait,
            };
            if proxy.told.as_ref() != Some(&told) {
                proxy.told = Some(told.clone());
                let Told {
                    pools,
                    write_off,
                    backlogs,
                    is_alone,
                } = told;
                news.push(News {
                    stream,
                    pools,
                    write_off,
                    backlogs,
                    is_alone,
                });
            }
        }
        news
    }
}
