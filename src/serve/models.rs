//! Base and adapters by the names requests use.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::{
    engine::Engine,
    error::ApiError,
    finding_basis::{FindingBasis, FindingFiles},
};
use crate::{
    adapters::lora::{base::check_base, files::trained_pixel_limits, folder::find_adapter},
    eval::probability::calibration::CalibrationError,
    processor::{chat::ChatTemplate, sample::PixelLimits},
    qwen3_vl::weights::gguf::GgufParts,
    runtime::generate::backend::AdapterId,
};

/// A model that requests can name.
#[derive(Debug, Clone)]
pub struct ModelEntry {
    /// For the engine.
    pub adapter: AdapterId,
    /// The base's template, or that of the adapter's folder.
    pub template: ChatTemplate,
    /// Pixel limits of the adapter's training, where its folder has them, in place of the server's.
    pub limits: PixelLimits,
    /// What a reader of its answers should know about how the adapter was read.
    remarks: Vec<String>,
    /// What its probabilities of findings rest on.
    pub findings: Arc<FindingBasis>,
    /// Seconds since 1970.
    created: u64,
}

/// All models that requests can name.
#[derive(Debug)]
pub struct Models {
    base: String,
    base_template: ChatTemplate,
    /// Folder of the base, which adapters must have been trained on; `None` skips the check.
    base_dir: Option<(PathBuf, GgufParts)>,
    /// Whether adapters bring the pixel limits of their training.
    own_limits: bool,
    /// Where calibrations are found.
    files: FindingFiles,
    entries: RwLock<BTreeMap<String, ModelEntry>>,
    /// What a reader of answers should know about how the base was read.
    remarks: Vec<String>,
    /// Most adapters at once.
    max_adapters: usize,
    /// One change at a time, so that a name is never given twice.
    changing: tokio::sync::Mutex<()>,
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn not_found(name: &str) -> ApiError {
    ApiError {
        status: StatusCode::NOT_FOUND,
        message: format!(
            "the model `{}` does not exist; `GET /v1/models` lists those that do",
            short(name).escape_debug()
        ),
        param: Some("model".into()),
        code: Some("model_not_found"),
    }
}

/// Enough of a name to recognise it.
fn short(name: &str) -> String {
    name.chars().take(100).collect()
}

impl Models {
    /// The base alone.
    pub fn new(base: impl Into<String>, template: ChatTemplate) -> Self {
        let base = base.into();
        let entry = ModelEntry {
            adapter: AdapterId::BASE,
            template: template.clone(),
            limits: PixelLimits::default(),
            remarks: Vec::new(),
            findings: Arc::new(FindingBasis::Uncalibrated(
                "this server was not told where its model's files are".into(),
            )),
            created: now(),
        };
        Self {
            entries: RwLock::new(BTreeMap::from([(base.clone(), entry)])),
            base,
            base_template: template,
            base_dir: None,
            own_limits: true,
            remarks: Vec::new(),
            files: FindingFiles::default(),
            max_adapters: MAX_ADAPTERS,
            changing: tokio::sync::Mutex::new(()),
        }
    }

    /// Refuses adapters that were trained on another base than the one in `dir`.
    pub fn only_for(mut self, dir: PathBuf, parts: GgufParts) -> Self {
        self.base_dir = Some((dir, parts));
        self
    }

    /// Shows every model images of the server's own limits, whatever adapters were trained with.
    pub fn with_one_size(mut self) -> Self {
        self.own_limits = false;
        self
    }

    /// Says of every model how the base was read: what was mapped, left out or guessed.
    pub fn with_remarks(mut self, remarks: Vec<String>) -> Self {
        self.remarks = remarks;
        self
    }

    /// Finds the calibrations of the base, and later those of adapters, in the folders of their files.
    ///
    /// # Errors
    /// A calibration of the base that cannot be used.
    pub fn with_calibrations(mut self, files: FindingFiles) -> Result<Self, CalibrationError> {
        let basis = Arc::new(FindingBasis::find(&files, None)?);
        let entries = self.entries.get_mut();
        if let Some(entry) = entries
            .unwrap_or_else(PoisonError::into_inner)
            .get_mut(&self.base)
        {
            entry.findings = basis;
        }
        self.files = files;
        Ok(self)
    }

    /// Takes at most `count` adapters.
    pub fn with_max_adapters(mut self, count: usize) -> Self {
        self.max_adapters = count;
        self
    }

    /// The base's name.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The named model, the base when none is named.
    ///
    /// # Errors
    /// [`ApiError`] of status 404.
    pub fn find(&self, name: Option<&str>) -> Result<ModelEntry, ApiError> {
        let name = name.unwrap_or(&self.base);
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(name).cloned().ok_or_else(|| not_found(name))
    }

    /// OpenAI's model objects, the base first.
    pub fn list(&self) -> Vec<Value> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<(&String, &ModelEntry)> = entries.iter().collect();
        all.sort_by_key(|(name, _)| (**name != self.base, (*name).clone()));
        all.into_iter()
            .map(|(name, entry)| self.object(name, entry))
            .collect()
    }

    /// OpenAI's object of one model.
    ///
    /// # Errors
    /// [`ApiError`] of status 404.
    pub fn describe(&self, name: &str) -> Result<Value, ApiError> {
        Ok(self.object(name, &self.find(Some(name))?))
    }

    fn object(&self, name: &str, entry: &ModelEntry) -> Value {
        let parent = (name != self.base).then_some(&self.base);
        json!({
            "id": name,
            "object": "model",
            "created": entry.created,
            "owned_by": "xray-qwen3vl",
            "root": self.base,
            "parent": parent,
            "thinking": entry.template.opens_thinking(),
            "remarks": self.remarks.iter().chain(&entry.remarks).collect::<Vec<_>>(),
        })
    }

    /// Loads the adapter in `dir` under `name`.
    ///
    /// # Errors
    /// [`ApiError`]: the name is taken, or the folder cannot be used; why is in the log.
    pub async fn load(&self, engine: &Engine, name: &str, dir: PathBuf) -> Result<(), ApiError> {
        let _one = self.changing.lock().await;
        check_name(name)
            .map_err(|reason| ApiError::invalid("lora_name", format!("`lora_name` {reason}")))?;
        if self.find(Some(name)).is_ok() {
            return Err(ApiError::invalid(
                "lora_name",
                format!("the name `{name}` is in use; unload it first or take another"),
            ));
        }
        let adapters = {
            let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
            entries.len() - 1
        };
        if adapters >= self.max_adapters {
            return Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                format!(
                    "{adapters} adapters are loaded, as many as this server takes; unload one first"
                ),
            )
            .with_code("too_many_adapters"));
        }
        let refused = |reason: String| {
            log::warn!("adapter `{name}`: {reason}");
            ApiError::invalid(
                "lora_path",
                "the adapter cannot be loaded; the server's log says why",
            )
        };
        let mut remarks = Vec::new();
        let found = find_adapter(&dir);
        // A link inside may lead elsewhere.
        let inside = |path: &Path| {
            let (path, around) = (path.canonicalize().ok()?, dir.canonicalize().ok()?);
            path.starts_with(around).then_some(path)
        };
        let dir = match (found.note, inside(&found.dir)) {
            (Some(note), Some(path)) => {
                log::info!("adapter `{name}`: {note}");
                remarks.push(note);
                path
            }
            _ => dir,
        };
        let template = ChatTemplate::find(&dir, None)
            .map_err(|error| refused(error.to_string()))?
            .unwrap_or_else(|| self.base_template.clone());
        let trained = match self.own_limits {
            true => trained_pixel_limits(&dir).map_err(|error| refused(error.to_string()))?,
            false => None,
        };
        let limits = trained.map_or_else(PixelLimits::default, |[min, max]| PixelLimits {
            min_pixels: Some(min),
            max_pixels: Some(max),
        });
        if let Some((base, parts)) = self.base_dir.clone() {
            let dir = dir.clone();
            let checked = tokio::task::spawn_blocking(move || check_base(&dir, &base, &parts));
            checked
                .await
                .map_err(|error| refused(error.to_string()))?
                .map_err(|error| refused(error.to_string()))?;
        }
        let (files, folder) = (self.files.clone(), dir.clone());
        let findings =
            tokio::task::spawn_blocking(move || FindingBasis::find(&files, Some(&folder)));
        let findings = findings
            .await
            .map_err(|error| refused(error.to_string()))?
            .map_err(|error| refused(error.to_string()))?;
        let loaded = engine.load_adapter(dir).await.map_err(refused)?;
        remarks.extend(loaded.notes);
        let entry = ModelEntry {
            adapter: loaded.id,
            template,
            limits,
            remarks,
            findings: Arc::new(findings),
            created: now(),
        };
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Takes the named adapter out; answers that are under way come to their end.
    ///
    /// # Errors
    /// [`ApiError`]: there is none of this name, or it is the base.
    pub async fn unload(&self, engine: &Engine, name: &str) -> Result<(), ApiError> {
        let _one = self.changing.lock().await;
        if name == self.base {
            return Err(ApiError::invalid(
                "lora_name",
                "the base model cannot be unloaded",
            ));
        }
        let entry = {
            let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
            entries.remove(name).ok_or_else(|| not_found(name))?
        };
        engine.unload_adapter(entry.adapter).await;
        Ok(())
    }
}

/// Default of the most adapters at once.
pub const MAX_ADAPTERS: usize = 32;

/// Longest name of an adapter, in bytes.
const LONGEST_NAME: usize = 100;

/// Checks the name of an adapter: it is seen in lists, logs and addresses.
///
/// # Errors
/// What is wrong with it, to follow what it is the name of.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > LONGEST_NAME {
        return Err(format!(
            "has {} bytes, expected 1 to {LONGEST_NAME}",
            name.len()
        ));
    }
    let known = |letter: char| letter.is_alphanumeric() || "._-:/".contains(letter);
    let plain = |part: &str| part.starts_with(char::is_alphanumeric) && !part.contains("..");
    if !name.chars().all(known) || !name.split('/').all(plain) {
        return Err(
            "is no name: expected letters, digits and `.`, `_`, `-`, `:`, with `/` between parts \
             that begin with a letter or digit and hold no `..`"
                .into(),
        );
    }
    Ok(())
}

/// The folder `name` inside `root`, and nowhere else.
///
/// # Errors
/// [`ApiError`]: not a plain name, or no such folder.
pub fn folder_inside(root: &Path, name: &str) -> Result<PathBuf, ApiError> {
    let wrong = || {
        ApiError::invalid(
            "lora_path",
            "`lora_path` is not a folder of the server's adapter folder; expected its plain name",
        )
    };
    let path = Path::new(name);
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(_)), None) => {}
        _ => return Err(wrong()),
    }
    let root = root.canonicalize().map_err(|_| wrong())?;
    // A link may lead elsewhere.
    let found = root.join(path).canonicalize().map_err(|_| wrong())?;
    if found.starts_with(&root) && found.is_dir() {
        Ok(found)
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapters_name_cannot_pretend_to_be_something_else() {
        for good in ["a", "chest-v1.2", "org/model:latest", "胸片_2"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            " ",
            "a b",
            "x\n2026-11-30 ERROR forged",
            "\u{1b}[31m",
            "../../etc",
            "a/../b",
            "a..b",
            "/etc",
            "a/",
            "<script>",
            ".hidden",
            "a\u{202e}b",
            &"a".repeat(101),
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn no_name_leads_out_of_the_adapter_folder() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("a")).unwrap();
        std::fs::write(root.path().join("file"), "").unwrap();
        assert!(folder_inside(root.path(), "a").is_ok());
        for bad in [
            "",
            ".",
            "..",
            "../a",
            "/",
            "/etc",
            "a/b",
            "file",
            "none",
            "a/../../x",
        ] {
            assert!(folder_inside(root.path(), bad).is_err(), "{bad}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("/etc", root.path().join("link")).unwrap();
            assert!(folder_inside(root.path(), "link").is_err());
        }
    }
}
