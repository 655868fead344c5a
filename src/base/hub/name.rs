//! Names of models: `OWNER/NAME`, with the prefix of a hub and the suffix of a revision.

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

/// Longest id, as Hugging Face limits it.
const LONGEST_ID: usize = 96;

/// What cannot be the name of a model.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{text}` is no name of a model on a hub: {reason}; expected OWNER/NAME, OWNER/NAME@REVISION, or one of them with the prefix `hf:` or `ms:`"
)]
pub struct NameError {
    /// What was typed.
    text: String,
    /// What is wrong with it.
    reason: String,
}

/// Where models are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hub {
    /// huggingface.co, or a mirror of it.
    HuggingFace,
    /// modelscope.cn.
    ModelScope,
}

impl fmt::Display for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HuggingFace => "Hugging Face",
            Self::ModelScope => "ModelScope",
        })
    }
}

impl Hub {
    /// Prefix of an id that chooses this hub.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::HuggingFace => "hf:",
            Self::ModelScope => "ms:",
        }
    }

    /// The revision that is meant where none is named.
    pub fn default_revision(self) -> &'static str {
        match self {
            Self::HuggingFace => "main",
            Self::ModelScope => "master",
        }
    }
}

/// A model of a hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    /// The hub, where one was named.
    pub hub: Option<Hub>,
    /// `OWNER/NAME`; a few old models of Hugging Face have no owner.
    pub id: String,
    /// Branch, tag or commit, where one was named.
    pub revision: Option<String>,
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(hub) = self.hub {
            f.write_str(hub.prefix())?;
        }
        f.write_str(&self.id)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

impl ModelId {
    /// Reads a name; `None` where it has the form of a path and no prefix of a hub.
    ///
    /// # Errors
    /// [`NameError`] for text after `hf:` or `ms:` that is no name.
    pub fn parse(text: &str) -> Result<Option<Self>, NameError> {
        let hubs = [Hub::HuggingFace, Hub::ModelScope];
        let named = hubs
            .into_iter()
            .find_map(|hub| Some((hub, text.strip_prefix(hub.prefix())?)));
        let (hub, rest) = match named {
            Some((hub, rest)) => (Some(hub), rest),
            None => (None, text),
        };
        match (read(rest, hub), hub) {
            (Ok((id, revision)), _) => Ok(Some(Self { hub, id, revision })),
            (Err(_), None) => Ok(None),
            (Err(reason), Some(_)) => Err(NameError {
                text: text.to_owned(),
                reason,
            }),
        }
    }

    /// [`Self::parse`] where nothing else than a name can be meant.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn parse_strictly(text: &str) -> Result<Self, NameError> {
        match Self::parse(text)? {
            Some(id) => Ok(id),
            None => Err(NameError {
                text: text.to_owned(),
                reason: read(text, None).err().unwrap_or_default(),
            }),
        }
    }

    /// The owner, empty where there is none, and the name.
    pub fn parts(&self) -> (&str, &str) {
        self.id.split_once('/').unwrap_or(("", &self.id))
    }
}

fn read(text: &str, hub: Option<Hub>) -> Result<(String, Option<String>), String> {
    let (id, revision) = match text.split_once('@') {
        Some((id, revision)) => (id, Some(revision)),
        None => (text, None),
    };
    if id.len() > LONGEST_ID {
        return Err(format!("it is longer than {LONGEST_ID} letters"));
    }
    let parts = id.split('/').count();
    if parts > 2 || (parts == 1 && hub != Some(Hub::HuggingFace)) {
        return Err(format!("it has {parts} part(s) between `/`, not two"));
    }
    for part in id.split('/') {
        let known = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
        if part.is_empty() || !part.chars().all(known) {
            return Err("its parts are made of letters, digits, `.`, `_` and `-`".into());
        }
        if part.starts_with(['.', '-']) || part.contains("..") || part.contains("--") {
            return Err(format!(
                "`{part}` begins with `.` or `-`, or holds `..` or `--`"
            ));
        }
    }
    if let Some(revision) = revision {
        check_revision(revision)?;
    }
    Ok((id.to_owned(), revision.map(str::to_owned)))
}

/// Whether a revision can be a branch, tag or commit; it becomes part of a path.
///
/// # Errors
/// What is wrong with it, as the end of a sentence.
pub fn check_revision(revision: &str) -> Result<(), String> {
    let known = |letter: char| letter.is_ascii_alphanumeric() || "._-/+".contains(letter);
    let bad = |part: &str| part.is_empty() || part.starts_with('.') || part.contains("..");
    if revision.len() > 200 || !revision.chars().all(known) || revision.split('/').any(bad) {
        return Err(format!("`{revision}` is no branch, tag or commit"));
    }
    Ok(())
}

/// A path with `~` at its beginning replaced by the home folder, as a shell does outside quotes.
pub fn expand_home(path: &Path) -> PathBuf {
    match path.strip_prefix("~") {
        Ok(rest) => match home() {
            Some(home) => home.join(rest),
            None => path.to_path_buf(),
        },
        Err(_) => path.to_path_buf(),
    }
}

/// The user's home folder, where the system names one.
pub(super) fn home() -> Option<PathBuf> {
    env::home_dir().filter(|home| !home.as_os_str().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<ModelId> {
        ModelId::parse(text).unwrap()
    }

    #[test]
    fn a_name_has_an_owner_and_may_have_hub_and_revision() {
        let plain = parsed("Qwen/Qwen3-VL-8B-Instruct").unwrap();
        assert_eq!(plain.parts(), ("Qwen", "Qwen3-VL-8B-Instruct"));
        assert_eq!((plain.hub, plain.revision.as_deref()), (None, None));
        let full = parsed("ms:Qwen/Qwen2.5@refs/pr/1").unwrap();
        assert_eq!(full.hub, Some(Hub::ModelScope));
        assert_eq!(full.revision.as_deref(), Some("refs/pr/1"));
        assert_eq!(full.to_string(), "ms:Qwen/Qwen2.5@refs/pr/1");
        assert_eq!(parsed("hf:gpt2").unwrap().id, "gpt2");
    }

    #[test]
    fn a_path_is_no_name() {
        for path in [
            "model", "/a/b", "./a", "../a", "a/b/c", "a b/c", "~/a", "a/", "a/../b", "a/.b",
            "模型/a",
        ] {
            assert_eq!(parsed(path), None, "{path}");
        }
    }

    #[test]
    fn a_name_that_cannot_be_one_is_refused() {
        for text in [
            "hf:",
            "ms:gpt2",
            "hf:a/b/c",
            "hf:../a",
            "ms:a/b@",
            "ms:a/b@../c",
            "hf:a/b@/x",
            "hf:a/b@x//y",
        ] {
            let error = ModelId::parse(text).unwrap_err().to_string();
            assert!(
                error.contains(text) && error.contains("OWNER/NAME"),
                "{error}"
            );
        }
        assert!(ModelId::parse_strictly("model").is_err());
    }

    #[test]
    fn the_home_folder_is_filled_in() {
        let home = home().unwrap();
        assert_eq!(expand_home(Path::new("~/a")), home.join("a"));
        assert_eq!(expand_home(Path::new("~")), home);
        assert_eq!(expand_home(Path::new("a/~/b")), Path::new("a/~/b"));
        assert_eq!(expand_home(Path::new("~other/b")), Path::new("~other/b"));
    }
}
