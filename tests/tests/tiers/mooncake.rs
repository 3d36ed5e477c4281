//! A Mooncake store below `HiCache`, which tells of objects over a socket of its own.

use std::collections::HashMap;

use kv_tests::sidecar::applied;
use kv_tests::stack::Stack;
use kv_tests::{place, wait};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use zeromq::{PubSocket, Socket as _, SocketSend as _, ZmqMessage};

/// Its id among the workers.
pub(crate) const MOONCAKE: u64 = 91;
/// Tokens to a page.
pub(crate) const PAGE: u32 = 64;
/// The objects of a page: each has a bit by its position.
pub(crate) const PARTS: [&str; 2] = ["_0_k", "_0_v"];
/// A page with all of them.
pub(crate) const WHOLE: u8 = 0b11;

/// Names of a prompt's pages, as SGLang names them.
pub(crate) fn digests(prompt: &[u32]) -> Vec<String> {
    let mut digest = Vec::new();
    let pages = prompt.chunks_exact(PAGE as usize).map(|page| {
        let mut chain = Sha256::new_with_prefix(&digest);
        page.iter()
            .for_each(|token| chain.update(token.to_le_bytes()));
        digest = chain.finalize().to_vec();
        let hexadecimal = digest.iter().map(|byte| format!("{byte:02x}"));
        hexadecimal.collect::<Vec<_>>().concat()
    });
    pages.collect()
}

/// What became of an object.
pub(crate) fn object(is_stored: bool, page: &str, part: &str, tenant: &str) -> Value {
    json!({
        "event_type": if is_stored { "stored" } else { "removed" },
        "object_key": format!("tag_{page}{part}"),
        "tenant_id": tenant,
        "group_id": null,
    })
}

/// The publisher of a Mooncake store.
pub(crate) struct Mooncake {
    socket: PubSocket,
    sequence: u64,
    /// Objects that are there, by page.
    pub(crate) pages: HashMap<u64, u8>,
}

impl Mooncake {
    /// One that publishes at the address returned.
    pub(crate) async fn start() -> (Self, String) {
        let mut socket = PubSocket::new();
        let address = format!("tcp://127.0.0.1:{}", place::free_port());
        socket.bind(&address).await.expect("a free port");
        let mooncake = Self {
            socket,
            sequence: 0,
            pages: HashMap::new(),
        };
        (mooncake, address)
    }

    pub(crate) async fn publish(&mut self, events: &[Value]) {
        let payload = rmp_serde::to_vec_named(&json!([1.5, events, 0])).expect("serialisable");
        let number = bytes::Bytes::copy_from_slice(&self.sequence.to_be_bytes());
        self.sequence += 1;
        let frames = vec!["".into(), number, payload.into()];
        let message = ZmqMessage::try_from(frames).expect("frames");
        self.socket.send(message).await.expect("sent");
    }

    /// Waits until the sidecar hears all that is published. Returns the events applied by then.
    pub(crate) async fn heard(&mut self, stack: &Stack) -> u64 {
        let blocks = async || {
            let workers = stack.sidecar.workers().await?;
            let pools = workers["pools"].as_array().into_iter().flatten();
            let mut owners = pools.flat_map(|pool| pool["owners"].as_array().into_iter().flatten());
            let store = owners.find(|owner| owner["worker"] == MOONCAKE);
            let blocks = store.and_then(|store| store["blocks"].as_u64());
            blocks.ok_or_else(|| workers.to_string())
        };
        let page_of = |token: u32| digests(&[token; PAGE as usize]).concat();
        let all = |is_stored: bool, page: &str| {
            PARTS.map(|part| object(is_stored, page, part, "default"))
        };
        let mut pages = Vec::new();
        // What is published before the subscription has come through is lost.
        let begun = async || {
            if blocks().await? > 0 {
                return Ok(());
            }
            let page = page_of(u32::MAX - u32::try_from(pages.len()).expect("few"));
            self.publish(&all(true, &page)).await;
            pages.push(page);
            Err("nothing is heard".to_owned())
        };
        wait::until("the store", begun).await;
        // The last page goes last, and it was heard of.
        let gone: Vec<Value> = pages.iter().flat_map(|page| all(false, page)).collect();
        self.publish(&gone).await;
        let empty = async || match blocks().await? {
            0 => Ok(()),
            some => Err(format!("{some} blocks")),
        };
        wait::until("the store to be empty", empty).await;
        applied(&stack.sidecar.settled(0).await)
    }
}
