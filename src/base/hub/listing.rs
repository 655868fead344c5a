//! The files of a model on a hub, as its API lists them.

use serde::{Deserialize, de::DeserializeOwned};

use super::{
    HubError,
    client::{Client, Failure, encoded, header},
    name::Hub,
};

/// Proof that bytes are the listed ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Digest {
    /// Of the bytes; 64 lower-case hexadecimal digits.
    Sha256(String),
    /// Git's: SHA-1 of `blob SIZE`, a zero byte and the bytes; 40 digits.
    Git(String),
}

impl Digest {
    /// The digits.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Sha256(text) | Self::Git(text) => text,
        }
    }

    fn of(text: &str) -> Option<Self> {
        let text = text
            .trim_start_matches("W/")
            .trim_matches('"')
            .to_lowercase();
        let hexadecimal = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match text.len() {
            64 if hexadecimal => Some(Self::Sha256(text)),
            40 if hexadecimal => Some(Self::Git(text)),
            _ => None,
        }
    }
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Path in the repository, with `/`.
    pub(super) path: String,
    /// Length in bytes, where the hub lists it.
    pub(super) size: Option<u64>,
    /// Where the hub lists it.
    pub(super) digest: Option<Digest>,
}

/// A revision of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) id: String,
    /// Commit on Hugging Face, the requested revision on ModelScope.
    pub(super) revision: String,
    pub(super) files: Vec<Entry>,
}

impl Listing {
    /// Asks the hub for a revision.
    pub(super) fn fetch(client: &Client, id: &str, revision: &str) -> Result<Self, Failure> {
        let listing = match client.hub {
            Hub::HuggingFace => hugging_face(client, id, revision),
            Hub::ModelScope => model_scope(client, id, revision),
        }
        .map_err(|failure| named(failure, id, revision))?;
        for entry in &listing.files {
            if !is_inside(&entry.path) {
                return Err(Failure::Final(HubError::Answer {
                    hub: client.hub,
                    url: client.endpoint.clone(),
                    reason: format!("{:?} is no path inside `{id}`", entry.path),
                }));
            }
        }
        Ok(listing)
    }

    /// Where a file's bytes are.
    pub(super) fn url(&self, client: &Client, path: &str) -> String {
        let (endpoint, id) = (&client.endpoint, &self.id);
        match client.hub {
            Hub::HuggingFace => format!(
                "{endpoint}/{id}/resolve/{}/{}",
                encoded(&self.revision, false),
                encoded(path, true)
            ),
            Hub::ModelScope => format!(
                "{endpoint}/api/v1/models/{id}/repo?Revision={}&FilePath={}",
                encoded(&self.revision, false),
                encoded(path, false)
            ),
        }
    }

    /// Fills in what a listing without sizes or hashes (of some mirrors) leaves out, from the file's own headers.
    pub(super) fn complete(&self, client: &Client, entry: &Entry) -> Result<Entry, Failure> {
        if client.hub == Hub::ModelScope || (entry.size.is_some() && entry.digest.is_some()) {
            return Ok(entry.clone());
        }
        let headers = client.head(&self.url(client, &entry.path))?;
        let either = |linked: &str, own: &str| {
            let found = header(&headers, linked).or_else(|| header(&headers, own));
            found.map(str::to_owned)
        };
        let digest = either("x-linked-etag", "etag").and_then(|text| Digest::of(&text));
        // The length of a redirect is that of its page.
        let size = match header(&headers, "location") {
            Some(_) => header(&headers, "x-linked-size").map(str::to_owned),
            None => either("x-linked-size", "content-length"),
        };
        Ok(Entry {
            path: entry.path.clone(),
            size: entry.size.or(size.and_then(|text| text.parse().ok())),
            digest: entry.digest.clone().or(digest),
        })
    }
}

/// Puts the model's name into a message about an address.
fn named(failure: Failure, id: &str, revision: &str) -> Failure {
    Failure::Final(match failure {
        Failure::Final(HubError::NotFound {
            hub,
            endpoint,
            hint,
            ..
        }) => HubError::NotFound {
            hub,
            endpoint,
            what: format!("`{id}` with a revision `{revision}`"),
            hint: if hint.is_empty() {
                "is the name right, its capital letters too?".into()
            } else {
                hint
            },
        },
        Failure::Final(HubError::Denied { hub, reason, .. }) => HubError::Denied {
            hub,
            id: id.to_owned(),
            reason,
        },
        other => return other,
    })
}

/// Whether a path stays below the folder it is joined to, on every system.
fn is_inside(path: &str) -> bool {
    let bad = |part: &str| part.is_empty() || part == "." || part == "..";
    // A path is also printed: no letter may steer the terminal.
    let odd = |letter: char| letter.is_control() || ['\\', ':'].contains(&letter);
    !path.contains(odd) && !path.split('/').any(bad)
}

fn json<T: DeserializeOwned>(client: &Client, url: &str) -> Result<T, Failure> {
    let text = client.text(url)?;
    serde_json::from_slice(&text).map_err(|cause| {
        Failure::Final(HubError::Answer {
            hub: client.hub,
            url: url.to_owned(),
            reason: cause.to_string(),
        })
    })
}

fn hugging_face(client: &Client, id: &str, revision: &str) -> Result<Listing, Failure> {
    #[derive(Deserialize)]
    struct Info {
        sha: String,
        #[serde(default)]
        siblings: Vec<Sibling>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Sibling {
        rfilename: String,
        size: Option<u64>,
        blob_id: Option<String>,
        lfs: Option<Lfs>,
    }
    #[derive(Deserialize)]
    struct Lfs {
        sha256: Option<String>,
        size: Option<u64>,
    }
    let url = format!(
        "{}/api/models/{id}/revision/{}?blobs=true",
        client.endpoint,
        encoded(revision, false)
    );
    let info: Info = json(client, &url)?;
    let plain = !info.sha.is_empty() && info.sha.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !plain {
        return Err(Failure::Final(HubError::Answer {
            hub: client.hub,
            url,
            reason: format!("`sha` is `{}`, expected a commit", info.sha),
        }));
    }
    let files = info.siblings.into_iter().map(|file| {
        let lfs = file.lfs;
        let digest = match &lfs {
            Some(lfs) => lfs.sha256.as_deref(),
            None => file.blob_id.as_deref(),
        };
        Entry {
            digest: digest.and_then(Digest::of),
            size: lfs.and_then(|lfs| lfs.size).or(file.size),
            path: file.rfilename,
        }
    });
    Ok(Listing {
        id: id.to_owned(),
        revision: info.sha,
        files: files.collect(),
    })
}

fn model_scope(client: &Client, id: &str, revision: &str) -> Result<Listing, Failure> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        code: Option<i64>,
        message: Option<String>,
        data: Option<Data>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Data {
        #[serde(default)]
        files: Vec<File>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct File {
        path: String,
        #[serde(default)]
        r#type: String,
        size: Option<u64>,
        sha256: Option<String>,
    }
    let url = format!(
        "{}/api/v1/models/{id}/repo/files?Revision={}&Recursive=true",
        client.endpoint,
        encoded(revision, false)
    );
    let answer: Answer = json(client, &url)?;
    let Some(data) = answer
        .data
        .filter(|_| answer.code.is_none_or(|code| code == 200))
    else {
        return Err(Failure::Final(HubError::NotFound {
            hub: client.hub,
            endpoint: client.endpoint.clone(),
            what: String::new(),
            hint: answer.message.unwrap_or_default(),
        }));
    };
    let blobs = data.files.into_iter().filter(|file| file.r#type != "tree");
    let files = blobs.map(|file| Entry {
        digest: file.sha256.as_deref().and_then(Digest::of),
        size: file.size,
        path: file.path,
    });
    Ok(Listing {
        id: id.to_owned(),
        revision: revision.to_owned(),
        files: files.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_path_stays_in_its_folder() {
        assert!(is_inside("a.json") && is_inside("a/b.json"));
        for path in [
            "", "/a", "../a", "a/../b", "a//b", "a\\b", "C:a", ".", "a\x1b[2J",
        ] {
            assert!(!is_inside(path), "{path}");
        }
    }

    #[test]
    fn a_digest_is_told_by_its_length() {
        let sha256 = "0".repeat(64);
        assert_eq!(
            Digest::of(&format!("\"{sha256}\"")),
            Some(Digest::Sha256(sha256))
        );
        let git = "a".repeat(40);
        assert_eq!(Digest::of(&format!("W/\"{git}\"")), Some(Digest::Git(git)));
        assert_eq!(Digest::of("1234"), None);
    }
}
