//! Qwen3-VL in llama.cpp's GGUF: a file with the language model, its tokenizer and its sizes, and a second
//! one, called mmproj, with the vision tower.

mod blocks;
mod config;
mod file;
mod names;
mod tokenizer;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{
    WeightsError,
    forms::Slice,
    single_or_index,
    stored::{Source, Stored, columns},
};
use blocks::{Blocks, PatchEmbed};
pub use config::ImageKeys;
use file::{GgufFile, Info};

/// Files that go with a GGUF, where they are named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GgufParts {
    /// The vision tower; without it the one in the folder of the language model.
    pub mmproj: Option<PathBuf>,
    /// Folder with the tokenizer of the original checkpoint, in place of the one in the GGUF.
    pub tokenizer: Option<PathBuf>,
}

/// The two files of a model.
#[derive(Debug)]
pub struct GgufPair {
    text: GgufFile,
    /// Further parts of the language model, which hold tensors alone.
    more: Vec<GgufFile>,
    vision: GgufFile,
}

const ENDING: &str = "gguf";
const CLIP: &str = "clip";

/// Whether `path` is named as one GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case(ENDING))
        && path.is_file()
}

/// The GGUF files in a folder, in order of name.
fn in_folder(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| is_gguf(path))
        .collect();
    files.sort();
    files
}

/// Whether `model` is a GGUF file, or a folder that has its weights in this form alone.
pub fn is_model(model: &Path) -> bool {
    is_gguf(model)
        || model.is_dir() && single_or_index(model).is_none() && !in_folder(model).is_empty()
}

/// Opens the files of the model `model`; `None` where it is not in this form.
///
/// # Errors
/// [`WeightsError::Gguf`]: files are missing, or several could be meant.
pub fn find(model: &Path, parts: &GgufParts) -> Result<Option<GgufPair>, WeightsError> {
    if !is_model(model) {
        return match &parts.mmproj {
            None => Ok(None),
            Some(mmproj) => Err(WeightsError::Gguf {
                path: mmproj.clone(),
                reason: format!(
                    "--mmproj goes with a language model in GGUF, which `{}` is not",
                    model.display()
                ),
            }),
        };
    }
    let folder = match model.is_dir() {
        true => model,
        false => model.parent().unwrap_or(Path::new(".")),
    };
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    let beside = || in_folder(folder);
    let refuse = |reason: String| WeightsError::Gguf {
        path: model.to_path_buf(),
        reason,
    };
    let text = if model.is_dir() {
        // Of a model in several parts, the first one.
        let is_text = |path: &PathBuf| {
            let file = GgufFile::open(path)?;
            let is_first = file.part().is_none_or(|(part, _)| part == 0);
            Ok(is_first && file.architecture() != CLIP)
        };
        only(beside(), is_text)?.map_err(|files| {
            refuse(match files.as_slice() {
                [] => "the folder has no GGUF file of a language model; expected one beside the mmproj file".to_string(),
                files => format!("the folder has several language models; name one of them: {}", list(files)),
            })
        })?
    } else {
        model.to_path_buf()
    };
    let text = GgufFile::open(&text)?;
    if text.architecture() == CLIP {
        return Err(text.refuse("this is the vision tower (mmproj); name the file with the language model, and this one with --mmproj"));
    }
    // Later parts have no metadata of their own, so this comes first.
    let more = text.other_parts()?;
    config::check_architecture(&text)?;
    let vision = match &parts.mmproj {
        Some(path) => path.clone(),
        None => {
            let is_vision =
                |path: &PathBuf| GgufFile::open(path).map(|file| file.architecture() == CLIP);
            only(beside(), is_vision)?.map_err(|files| {
                text.refuse(match files.as_slice() {
                    [] => "the file of the vision tower is missing; put the mmproj file of the same model beside it, or name it with --mmproj".to_string(),
                    files => format!("several mmproj files are beside it; name one with --mmproj: {}", list(files)),
                })
            })?
        }
    };
    let vision = GgufFile::open(&vision)?;
    if let Some((_, count)) = vision.part() {
        return Err(vision.refuse(format!(
            "the vision tower is in {count} parts, which are read of language models alone; join them with `llama-gguf-split --merge FIRST OUT`"
        )));
    }
    config::check_vision(&vision)?;
    Ok(Some(GgufPair { text, more, vision }))
}

/// The only file that `test` accepts; else all that it does.
fn only(
    files: Vec<PathBuf>,
    test: impl Fn(&PathBuf) -> Result<bool, WeightsError>,
) -> Result<Result<PathBuf, Vec<PathBuf>>, WeightsError> {
    let mut found = Vec::new();
    for file in files {
        if test(&file)? {
            found.push(file);
        }
    }
    Ok(match found.len() {
        1 => Ok(found.remove(0)),
        _ => Err(found),
    })
}

fn list(files: &[PathBuf]) -> String {
    let names: Vec<String> = files
        .iter()
        .map(|file| format!("`{}`", file.display()))
        .collect();
    names.join(", ")
}

impl GgufPair {
    /// The files: the language model, its further parts, the vision tower.
    pub fn files(&self) -> Vec<&Path> {
        self.opened().map(|file| file.path.as_path()).collect()
    }

    /// The file with the metadata of the language model.
    pub fn main_file(&self) -> &Path {
        &self.text.path
    }

    fn opened(&self) -> impl Iterator<Item = &GgufFile> {
        let text = std::iter::once(&self.text).chain(&self.more);
        text.chain([&self.vision])
    }

    /// Folder of the language model.
    pub fn folder(&self) -> &Path {
        match self.text.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// Jinja source of the chat template, where the file has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.text.text("tokenizer.chat_template")
    }
}

/// All tensors of the files under the names of the module tree, and what to say about them.
pub(super) fn tensors(
    pair: &GgufPair,
) -> Result<(BTreeMap<String, Stored>, Vec<String>), WeightsError> {
    let mut tensors = BTreeMap::new();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let deepstack = config::deepstack(&pair.vision);
    let vision = pair.more.len() + 1;
    for (number, file) in pair.opened().enumerate() {
        for (name, info) in &file.tensors {
            if info.kind.float().is_none() {
                *kinds.entry(format!("{:?}", info.kind)).or_default() += 1;
            }
            let found = match number == vision {
                false => names::text(name),
                true => names::vision(name, &deepstack),
            };
            // The second frame of the patch embedding goes with the first.
            if name == "v.patch_embd.weight.1" {
                continue;
            }
            let stored = match name.as_str() {
                "v.patch_embd.weight" => patch_embed(file, info, number)?,
                _ => Stored {
                    path: file.path.clone(),
                    shape: info.shape.clone(),
                    place: (number, info.range.0),
                    source: Source::Decoded(Box::new(blocks(file, info)?)),
                },
            };
            tensors.insert(found.unwrap_or_else(|| name.clone()), stored);
        }
    }
    let mut remarks = Vec::new();
    if !kinds.is_empty() {
        let kinds: Vec<String> = kinds
            .iter()
            .map(|(kind, count)| format!("{count} in {kind}"))
            .collect();
        remarks.push(format!(
            "tensors of the GGUF are dequantised while they are loaded ({}), to 16 or 32 bits a weight (with `--quantize keep` blocks of Q4_0 stay packed)",
            kinds.join(", ")
        ));
    }
    Ok((tensors, remarks))
}

fn blocks(file: &GgufFile, info: &Info) -> Result<Blocks, WeightsError> {
    let slice = Slice::new(&file.map, info.range.0..info.range.1)
        .ok_or_else(|| file.refuse("a tensor reaches beyond the end of the file"))?;
    Ok(Blocks {
        slice,
        kind: info.kind,
        columns: columns(&info.shape),
    })
}

fn patch_embed(file: &GgufFile, first: &Info, number: usize) -> Result<Stored, WeightsError> {
    let second = file.tensors.get("v.patch_embd.weight.1");
    let Some(second) = second.filter(|second| second.shape == first.shape) else {
        return Err(file.refuse(format!(
            "tensor `v.patch_embd.weight.1` is not there with the shape of `v.patch_embd.weight`, {:?}; was the file made by a llama.cpp that knows Qwen3-VL?",
            first.shape
        )));
    };
    let [out, channels, height, width] = first.shape[..] else {
        return Err(file.refuse(format!(
            "tensor `v.patch_embd.weight` has shape {:?}, expected four sizes",
            first.shape
        )));
    };
    Ok(Stored {
        path: file.path.clone(),
        shape: vec![out, channels, 2, height, width],
        place: (number, first.range.0),
        source: Source::Decoded(Box::new(PatchEmbed {
            frames: [blocks(file, first)?, blocks(file, second)?],
            area: height * width,
        })),
    })
}
