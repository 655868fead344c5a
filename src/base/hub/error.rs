//! Why a model is not found, or cannot be downloaded.

use std::{io, path::PathBuf};

use super::name::{Hub, ModelId, NameError};
use crate::base::files::{FileError, size_text};

/// Why a name gives no folder.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A name with a hub's prefix, or typed for `pull`, that is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A name of a hub that is neither a folder nor downloaded.
    #[error("`{id}` is neither a folder here nor downloaded{}", looked_at(.looked))]
    Absent {
        /// What was typed.
        id: ModelId,
        /// What was looked at, with what is missing there.
        looked: Vec<String>,
    },
    /// A file that was cloned without git-lfs.
    #[error(
        "`{}` is a git-lfs pointer, not the weights; run `git lfs pull` in its folder, or download the model again", .0.display()
    )]
    LfsPointer(PathBuf),
    /// A cache's folder of a model without a snapshot that is whole.
    #[error("`{}` is a folder of a cache without a complete download{}", .folder.display(), looked_at(.looked))]
    NoSnapshot {
        /// The folder.
        folder: PathBuf,
        /// What was looked at, with what is missing there.
        looked: Vec<String>,
    },
    /// A variable of the environment forbids it.
    #[error(
        "`{id}` is not downloaded: {variable} is set, so nothing is fetched; unset it, or copy the folder here"
    )]
    Offline {
        /// The model.
        id: ModelId,
        /// `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`.
        variable: &'static str,
    },
    /// An address in the environment is none.
    #[error("{variable} is `{value}`, expected an address such as https://hf-mirror.com")]
    Endpoint {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// The address needs TLS, which the program was built without.
    #[error("`{0}` needs TLS; this program was built without `tls`")]
    NoTls(String),
    /// The certificates named by the environment cannot be used.
    #[error("`{}` of {variable}: {reason}; expected certificates as PEM", .path.display())]
    Certificates {
        /// The variable.
        variable: &'static str,
        /// Its value.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The hub does not answer.
    #[error("{} does not answer at {endpoint}: {reason}; {}", .hub, other_way(*.hub))]
    Unreachable {
        /// The hub.
        hub: Hub,
        /// Its address.
        endpoint: String,
        /// The last failure.
        reason: String,
    },
    /// No such model, revision or file.
    #[error("{hub} has no {what} at {endpoint}{}", advice(.hint))]
    NotFound {
        /// The hub.
        hub: Hub,
        /// Its address.
        endpoint: String,
        /// The model, revision or file.
        what: String,
        /// What may help.
        hint: String,
    },
    /// The hub wants to know who asks, or refuses.
    #[error("{hub} does not give `{id}` ({reason}); {}", token_way(*.hub))]
    Denied {
        /// The hub.
        hub: Hub,
        /// The model.
        id: String,
        /// What it said.
        reason: String,
    },
    /// An answer that is not what the hub's protocol says.
    #[error(
        "{hub} answered {url} with something else than expected: {reason}; does the address belong to a hub?"
    )]
    Answer {
        /// The hub.
        hub: Hub,
        /// What was fetched.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// No file of the repository matches the request.
    #[error("`{id}` holds nothing to take: {reason}")]
    Nothing {
        /// The model.
        id: String,
        /// Why, and what to type.
        reason: String,
    },
    /// A transfer broke off more often than it went on.
    #[error(
        "`{file}` of `{id}` does not come: {reason}; what has come is kept, start again to go on with it"
    )]
    Broken {
        /// The model.
        id: String,
        /// The file.
        file: String,
        /// The last failure.
        reason: String,
    },
    /// The bytes are not those the hub lists, however often they are fetched.
    #[error(
        "`{file}` of `{id}` came {times} times with other bytes than the hub lists ({what} is `{found}`, expected `{expected}`) and was deleted; try another address, a proxy may change files"
    )]
    Checksum {
        /// The model.
        id: String,
        /// The file.
        file: String,
        /// `size`, `sha256` or `git hash`.
        what: &'static str,
        /// What the hub lists.
        expected: String,
        /// What came.
        found: String,
        /// How often.
        times: usize,
    },
    /// The disk is too small.
    #[error("`{}` has {} free, the download needs {}; free space, or name another place with --output or HF_HOME (MODELSCOPE_CACHE)", .folder.display(), size_text(*.free), size_text(*.needed))]
    Space {
        /// Where it goes.
        folder: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A lock of another download cannot be taken.
    #[error("cannot lock `{}`: {cause}", .path.display())]
    Lock {
        /// The lock's file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A file cannot be written or read.
    #[error(transparent)]
    File(#[from] FileError),
}

fn looked_at(looked: &[String]) -> String {
    match looked {
        [] => String::new(),
        some => format!(" ({})", some.join("; ")),
    }
}

fn advice(text: &str) -> String {
    match text {
        "" => String::new(),
        text => format!("; {text}"),
    }
}

fn other_way(hub: Hub) -> &'static str {
    match hub {
        Hub::HuggingFace => {
            "is there a network? A mirror is named by HF_ENDPOINT (https://hf-mirror.com), a proxy by HTTPS_PROXY and its certificate by SSL_CERT_FILE; most models are on ModelScope too (`--hub modelscope`, `ms:OWNER/NAME`)"
        }
        Hub::ModelScope => {
            "is there a network? A proxy is named by HTTPS_PROXY and its certificate by SSL_CERT_FILE; most models are on Hugging Face too (`--hub hf`, `hf:OWNER/NAME`)"
        }
    }
}

fn token_way(hub: Hub) -> &'static str {
    match hub {
        Hub::HuggingFace => {
            "is the name right? A private or gated model needs a token in HF_TOKEN (or `hf auth login`), and its terms accepted on its page"
        }
        Hub::ModelScope => {
            "is the name right? A private model needs a token in MODELSCOPE_API_TOKEN"
        }
    }
}
