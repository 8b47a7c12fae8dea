#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    cellblock::snapshot::format::fuzz::state(input);
});
