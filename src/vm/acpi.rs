//! Thin.
/// x
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// x
pub const SLEEP_TYPE_OFF: u8 = 5;
