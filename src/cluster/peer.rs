//! What processes say of themselves, and to whom.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Prints one line.
pub type Tell = Arc<dyn Fn(&str) + Send + Sync>;

/// What a process says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its number, from 0.
    pub rank: usize,
    /// How many it was started as one of.
    pub processes: usize,
    /// Its machine's name.
    pub host: String,
    /// Program and version.
    pub program: String,
    /// Its devices, as they are named there.
    pub devices: Vec<String>,
    /// What the launcher calls this start.
    pub id: Option<String>,
    /// `node` or `process`, as the first one says.
    pub noun: String,
}

impl Peer {
    /// What messages call it.
    pub fn name(&self) -> String {
        format!("{} {} (`{}`)", self.noun, self.rank, self.host)
    }
}
