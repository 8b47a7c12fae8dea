//! The one place that names `bincode`, so that another encoding can replace it.

use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_MESSAGE;

/// A value that could not be turned into bytes or back.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The value does not serialize, or is larger than [`MAX_MESSAGE`] bytes.
    #[error("encoding a message")]
    Encode(#[source] bincode::error::EncodeError),
    /// The bytes are not a value of the expected type.
    #[error("decoding a message")]
    Decode(#[source] bincode::error::DecodeError),
    /// The encoded value is larger than a channel carries.
    #[error("message of {0} bytes is larger than the {MAX_MESSAGE} a channel carries")]
    TooLarge(usize),
    /// The encoded value is larger than its kind may be.
    #[error("{size} bytes are more than the {limit} allowed")]
    Beyond {
        /// Bytes there are.
        size: usize,
        /// Bytes there may be.
        limit: usize,
    },
    /// Bytes were left over after the value.
    #[error("{0} stray bytes after a message")]
    Trailing(usize),
}

// Decoding stops before it allocates more than this many bytes for one message.
fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<{ 4 * MAX_MESSAGE }>()
}

/// Encodes `value`; fails when the result exceeds [`MAX_MESSAGE`] bytes.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, config()).map_err(CodecError::Encode)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(CodecError::TooLarge(bytes.len()));
    }
    Ok(bytes)
}

/// Decodes one value that must fill `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config()).map_err(CodecError::Decode)?;
    if used != bytes.len() {
        return Err(CodecError::Trailing(bytes.len() - used));
    }
    Ok(value)
}

/// Encodes `value`, which may take up to `LIMIT` bytes: for what does not go through a channel.
pub fn encode_within<const LIMIT: usize, T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let config = bincode::config::standard();
    let bytes = bincode::serde::encode_to_vec(value, config).map_err(CodecError::Encode)?;
    if bytes.len() > LIMIT {
        return Err(CodecError::Beyond { size: bytes.len(), limit: LIMIT });
    }
    Ok(bytes)
}

/// Decodes one value that must fill `bytes` exactly, without allocating more than `LIMIT` bytes
/// for it.
pub fn decode_within<const LIMIT: usize, T: DeserializeOwned>(
    bytes: &[u8],
) -> Result<T, CodecError> {
    if bytes.len() > LIMIT {
        return Err(CodecError::Beyond { size: bytes.len(), limit: LIMIT });
    }
    let config = bincode::config::standard().with_limit::<LIMIT>();
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config).map_err(CodecError::Decode)?;
    if used != bytes.len() {
        return Err(CodecError::Trailing(bytes.len() - used));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = encode(&(7u32, "x".to_string())).expect("encodes");
        assert_eq!(decode::<(u32, String)>(&bytes).expect("decodes"), (7, "x".into()));
        bytes.push(0);
        assert!(matches!(decode::<(u32, String)>(&bytes), Err(CodecError::Trailing(1))));
    }

    #[test]
    fn a_length_from_outside_cannot_make_us_allocate() {
        // A Vec that claims 2^60 elements.
        let bytes = [253u8, 0, 0, 0, 0, 0, 0, 0, 16];
        assert!(decode::<Vec<u64>>(&bytes).is_err());
    }

    #[test]
    fn size_limit_holds_when_sending() {
        assert!(matches!(encode(&vec![0u8; MAX_MESSAGE + 1]), Err(CodecError::TooLarge(_))));
    }
}
