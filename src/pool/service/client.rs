//! The client's end of a pool's socket.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::protocol::{Answer, Request, line};
use crate::remedy::Remedy;

/// Most bytes of an answer.
const MAX_ANSWER: u64 = 1 << 20;

/// A request that was not answered as hoped.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum ClientError {
    #[error("connecting to the pool at {}", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("talking to the pool")]
    Talk(#[from] io::Error),
    #[error("the pool closed the connection without an answer")]
    Gone,
    #[error("the answer is not one of a pool")]
    Garbage(#[source] Option<serde_json::Error>),
    #[error("{message}")]
    Refused { message: String, remedy: Option<String> },
}

impl Remedy for ClientError {
    fn remedy(&self) -> Option<String> {
        match self {
            ClientError::Connect { source, .. } => match source.kind() {
                ErrorKind::NotFound => {
                    Some("check the path: it is the one given to 'cellblock pool serve'".into())
                }
                ErrorKind::PermissionDenied => Some("run as the pool's user or as root".into()),
                ErrorKind::ConnectionRefused => Some("the pool that made it is gone".into()),
                _ => None,
            },
            ClientError::Gone => Some("it ended or was killed; its standard error says why".into()),
            ClientError::Refused { remedy, .. } => remedy.clone(),
            ClientError::Talk(_) | ClientError::Garbage(_) => None,
        }
    }
}

/// A connection, and with it the VM that was claimed by it.
#[derive(Debug)]
pub struct PoolClient {
    stream: BufReader<UnixStream>,
}

impl PoolClient {
    /// Connects to the pool at `path`.
    pub fn connect(path: &Path) -> Result<PoolClient, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(PoolClient { stream: BufReader::new(stream) })
    }

    /// Asks, waits for as long as it takes, and returns the answer with its line.
    pub fn ask(&mut self, request: &Request) -> Result<(Answer, String), ClientError> {
        // A server that turned us away has closed already: its line says why.
        let written = self.stream.get_mut().write_all(&line(request));
        match self.hear()? {
            Some((Answer::Error { message, remedy }, _)) => {
                Err(ClientError::Refused { message, remedy })
            }
            Some(answer) => Ok(answer),
            None => Err(written.err().map_or(ClientError::Gone, ClientError::Talk)),
        }
    }

    /// What the pool says next; nothing at the end of the connection.
    pub fn hear(&mut self) -> Result<Option<(Answer, String)>, ClientError> {
        let mut text = String::new();
        match (&mut self.stream).take(MAX_ANSWER).read_line(&mut text) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        if text.pop() != Some('\n') {
            return Err(ClientError::Garbage(None));
        }
        let answer = serde_json::from_str(&text).map_err(|e| ClientError::Garbage(Some(e)))?;
        Ok(Some((answer, text)))
    }
}

/// Readable when the pool has something to say, or is gone.
impl AsFd for PoolClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.get_ref().as_fd()
    }
}
