//! Files from the web: a connection, and a fetch that public addresses alone answer.

pub mod connection;
pub mod fetch;
#[cfg(feature = "tls")]
mod tls;
