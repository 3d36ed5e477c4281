//! A Wasm filter that does nothing, for telling what a filter costs from what ours costs. Written
//! byte by byte, so that no second Wasm crate has to be built: every callback returns a constant.

/// Signature: parameters, all `i32`, and whether there is an `i32` result.
type Signature = (u8, bool);

/// Exports of the Proxy-Wasm ABI with their signature and result.
const EXPORTS: [(&str, Signature, u8); 13] = [
    ("proxy_abi_version_0_2_1", (0, false), 0),
    ("proxy_on_memory_allocate", (1, true), 64),
    ("proxy_on_context_create", (2, false), 0),
    ("proxy_on_vm_start", (2, true), 1),
    ("proxy_on_configure", (2, true), 1),
    ("proxy_on_request_headers", (3, true), 0),
    ("proxy_on_request_body", (3, true), 0),
    ("proxy_on_request_trailers", (2, true), 0),
    ("proxy_on_response_headers", (3, true), 0),
    ("proxy_on_response_body", (3, true), 0),
    ("proxy_on_done", (1, true), 1),
    ("proxy_on_log", (1, false), 0),
    ("proxy_on_delete", (1, false), 0),
];

/// The module.
#[must_use]
pub fn module() -> Vec<u8> {
    let types = EXPORTS.iter().map(|(_, (params, result), _)| {
        let mut bytes = vec![0x60, *params];
        bytes.extend(std::iter::repeat_n(0x7f, usize::from(*params)));
        bytes.extend(if *result { vec![1, 0x7f] } else { vec![0] });
        bytes
    });
    let functions = (0..EXPORTS.len()).map(length);
    let memory = (*b"\x06memory\x02\x00").to_vec();
    let exports = EXPORTS.iter().enumerate().map(|(i, (name, _, _))| {
        let mut bytes = length(name.len());
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        bytes.extend(length(i));
        bytes
    });
    let codes = EXPORTS.iter().map(|(_, (_, result), value)| {
        let mut body = vec![0];
        if *result {
            // `i32.const`, in signed LEB128.
            body.push(0x41);
            body.extend(if *value < 64 {
                vec![*value]
            } else {
                vec![*value | 0x80, 0]
            });
        }
        body.push(0x0b);
        [length(body.len()), body].concat()
    });
    [
        b"\0asm\x01\0\0\0".to_vec(),
        section(1, &types.collect::<Vec<_>>()),
        section(3, &functions.collect::<Vec<_>>()),
        section(5, &[vec![0, 1]]),
        section(
            7,
            &std::iter::once(memory).chain(exports).collect::<Vec<_>>(),
        ),
        section(10, &codes.collect::<Vec<_>>()),
    ]
    .concat()
}

fn section(id: u8, items: &[Vec<u8>]) -> Vec<u8> {
    let body = [length(items.len()), items.concat()].concat();
    [vec![id], length(body.len()), body].concat()
}

/// Unsigned LEB128.
#[allow(clippy::cast_possible_truncation)]
fn length(mut n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while n >= 0x80 {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
    bytes
}
