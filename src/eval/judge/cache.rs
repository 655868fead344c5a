//! Answers that were paid for once: a line each, so that a run that was killed goes on where it stopped.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, ErrorKind as IoErrorKind, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    error::JudgeError,
    prompt::{Accepted, body},
};

#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    answer: String,
}

/// The answers of a file, and the file to add more to.
pub(super) struct Cache {
    known: HashMap<String, String>,
    file: Option<(PathBuf, Mutex<File>)>,
}

impl Cache {
    /// Reads `path`, which need not be there. A last line that was cut short is left out.
    ///
    /// # Errors
    /// [`JudgeError::Cache`].
    pub(super) fn open(path: Option<&Path>) -> Result<Self, JudgeError> {
        let Some(path) = path else {
            return Ok(Self {
                known: HashMap::new(),
                file: None,
            });
        };
        let fail = |cause| JudgeError::Cache {
            path: path.to_owned(),
            cause,
        };
        let mut known = HashMap::new();
        let mut whole = true;
        match File::open(path) {
            Ok(file) => {
                for line in BufReader::new(file).lines() {
                    let line = line.map_err(fail)?;
                    match serde_json::from_str::<Line>(&line) {
                        Ok(line) => {
                            known.insert(line.key, line.answer);
                        }
                        Err(_) => whole = false,
                    }
                }
            }
            Err(cause) if cause.kind() == IoErrorKind::NotFound => {}
            Err(cause) => return Err(fail(cause)),
        }
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(fail)?;
        if !whole {
            // The next line must not join the one that was cut.
            file.write_all(b"\n").map_err(fail)?;
        }
        Ok(Self {
            known,
            file: Some((path.to_owned(), Mutex::new(file))),
        })
    }

    /// The key of a pair: another prompt, model or report is another question.
    pub(super) fn key(model: &str, reference: &str, answer: &str) -> String {
        let asked = body(model, reference, answer, Accepted::ALL).to_string();
        let digest = Sha256::digest(asked.as_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.known.get(key).map(String::as_str)
    }

    /// Adds an answer to the file at once.
    ///
    /// # Errors
    /// [`JudgeError::Cache`].
    pub(super) fn add(&self, key: &str, answer: &str) -> Result<(), JudgeError> {
        let Some((path, file)) = &self.file else {
            return Ok(());
        };
        let line = Line {
            key: key.to_owned(),
            answer: answer.to_owned(),
        };
        let fail = |cause| JudgeError::Cache {
            path: path.clone(),
            cause,
        };
        let mut text = serde_json::to_string(&line).map_err(|cause| fail(cause.into()))?;
        text.push('\n');
        let mut file = file.lock().unwrap_or_else(|lock| lock.into_inner());
        file.write_all(text.as_bytes())
            .and_then(|()| file.flush())
            .map_err(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_comes_back_and_a_cut_line_does_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("judge.jsonl");
        let key = Cache::key("m", "甲", "乙");
        assert_ne!(key, Cache::key("n", "甲", "乙"));
        Cache::open(Some(&path))
            .and_then(|cache| cache.add(&key, "{}"))
            .expect("written");
        let mut text = std::fs::read_to_string(&path).expect("read");
        text.push_str("{\"key\":\"cut");
        std::fs::write(&path, text).expect("written");
        let cache = Cache::open(Some(&path)).expect("read");
        assert_eq!(cache.get(&key), Some("{}"));
        cache.add("other", "[]").expect("written");
        let cache = Cache::open(Some(&path)).expect("read");
        assert_eq!(cache.get("other"), Some("[]"));
    }
}
