#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    cellblock_devices::blk::fuzz::messages(input);
});
