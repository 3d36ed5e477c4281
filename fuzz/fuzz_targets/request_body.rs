#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kv_fuzz::request_body(bytes));
