//! This VM's mailbox: where the sidecar's verdicts on the requests that it holds come in.

use kv_core::key;
use kv_core::queue::{MAILBOXES, Mail, Mailbox as Record, Verdict, mailbox_name};

use crate::host::{Expect, Host, Queue};

/// Time between two stamps.
const STAMP_NS: u64 = 1_000_000_000;
/// Messages taken from the mailbox at a time, at most.
const MAX_MAIL: usize = 256;

/// A mailbox, or none yet.
#[derive(Debug, Default)]
pub struct Mailbox {
    vm: u64,
    claimed: Option<Claimed>,
}

#[derive(Clone, Copy, Debug)]
struct Claimed {
    number: u8,
    queue: Queue,
    /// The root context that is told of arrivals.
    root: u32,
    stamped_ns: u64,
}

impl Mailbox {
    /// Names the VM.
    pub fn set_vm(&mut self, vm: u64) {
        self.vm = vm;
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> Option<u8> {
        self.claimed.map(|claimed| claimed.number)
    }

    /// Whether this is its queue.
    #[must_use]
    pub fn is(&self, queue: Queue) -> bool {
        self.claimed.is_some_and(|claimed| claimed.queue == queue)
    }

    /// Claims a mailbox, or says that this one is in use still. At ticks of the root context in
    /// charge.
    pub fn keep(&mut self, host: &impl Host, root: u32, now_ns: u64) {
        if let Some(claimed) = self.claimed {
            let is_due = now_ns.saturating_sub(claimed.stamped_ns) >= STAMP_NS;
            if !is_due && claimed.root == root {
                return;
            }
            self.claimed = None;
            if self.stamp(host, claimed.number, now_ns) {
                self.open(host, claimed.number, root, now_ns);
                return;
            }
        }
        for number in 0..MAILBOXES {
            if self.stamp(host, number, now_ns) {
                self.open(host, number, root, now_ns);
                return;
            }
        }
    }

    /// Gives it up: nothing is held here any more.
    pub fn leave(&mut self, host: &impl Host) {
        if let Some(claimed) = self.claimed.take() {
            let free = Record { vm: 0, stamp_ns: 0 }.encode();
            let key = key::mailbox(claimed.number);
            if let Some(shared) = host.shared(&key)
                && Record::decode(&shared.bytes).is_some_and(|record| record.vm == self.vm)
            {
                host.set_shared(&key, &free, Expect::Version(shared.version));
            }
        }
    }

    /// What has come in, by ticket.
    #[must_use]
    pub fn take(&self, host: &impl Host) -> Vec<(u64, Verdict)> {
        let Some(claimed) = self.claimed else {
            return Vec::new();
        };
        let mail = (0..MAX_MAIL).map_while(|_| host.dequeue(claimed.queue));
        let mail = mail.filter_map(|bytes| Mail::decode(&bytes));
        // Whoever had the mailbox before may have left some.
        let own = mail.filter(|mail| mail.vm == self.vm);
        own.flat_map(|mail| mail.verdicts).collect()
    }

    /// Writes this VM and the time under a number that is its own or free.
    fn stamp(&self, host: &impl Host, number: u8, now_ns: u64) -> bool {
        let key = key::mailbox(number);
        let shared = host.shared(&key);
        let expected = match &shared {
            None => Expect::Nothing,
            Some(shared) => Expect::Version(shared.version),
        };
        let record = shared.and_then(|shared| Record::decode(&shared.bytes));
        if record.is_some_and(|record| record.vm != self.vm && !record.is_free(now_ns)) {
            return false;
        }
        let record = Record {
            vm: self.vm,
            stamp_ns: now_ns,
        };
        host.set_shared(&key, &record.encode(), expected)
    }

    fn open(&mut self, host: &impl Host, number: u8, root: u32, now_ns: u64) {
        let queue = host.register_queue(&mailbox_name(number));
        self.claimed = queue.map(|queue| Claimed {
            number,
            queue,
            root,
            stamped_ns: now_ns,
        });
    }
}
