//! Files of `torch.save`: a zip with a pickle that names tensors, and the bytes of each storage.
//!
//! A pickle is a program. The one read here may build a state dict of tensors and nothing else; it executes
//! nothing, allocates no more than its own length asks for, and every range of bytes is checked.
//!
//! Source: `torch/serialization.py` and `torch/_utils.py` of PyTorch 2.

mod archive;
mod pickle;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, path::Path};

use super::{Entry, WeightsError};
use archive::Archive;
use pickle::{Saved, printable};

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
enum Problem {
    /// Cut short, or changed.
    #[error("is not a whole file of torch.save: {0}; download or copy it again")]
    Damaged(String),
    /// The pickle calls for more than a state dict needs.
    #[error(
        "its pickle asks for `{0}`, which would run code; nothing was run. Only a state dict of tensors is read: take the weights from a source you trust, in safetensors form"
    )]
    Code(String),
    /// Something else than names and tensors.
    #[error(
        "{0}; expected a state dict, names and tensors alone, as `torch.save(model.state_dict(), …)` writes it"
    )]
    Content(String),
    /// Another form, with the command that converts it.
    #[error(
        "it is {what}, which is not read; if you trust where it comes from, convert it once: `{command}`"
    )]
    Form {
        /// The form.
        what: &'static str,
        /// What to run.
        command: String,
    },
}

/// How a file of another form is opened in Python.
#[derive(Debug, Clone, Copy)]
enum Opened {
    /// By `torch.load`.
    Load,
    /// By `torch.jit.load`.
    Script,
}

/// The command that writes the tensors of `path` as safetensors beside it.
fn command(path: &Path, opened: Opened) -> String {
    let text = path.display().to_string();
    // A path that would end the quotes, or that a shell reads otherwise, is left to the reader.
    let named = match text.contains(['\'', '"', '`', '$', '\\', '\n']) {
        true => "FILE".to_owned(),
        false => text,
    };
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    // Shards go together, and their index with them.
    if let (Opened::Load, true) = (opened, file.starts_with("pytorch_model-")) {
        let dir = match Path::new(&named).parent() {
            Some(dir) if named != "FILE" => dir.display().to_string(),
            _ => "DIR".to_owned(),
        };
        return format!(
            "python3 -c \"from transformers import AutoModelForImageTextToText as M; M.from_pretrained('{dir}', dtype='auto').save_pretrained('{dir}')\""
        );
    }
    let target = match file.starts_with("adapter_model") {
        true => "adapter_model.safetensors",
        false => "model.safetensors",
    };
    let load = match opened {
        Opened::Load => "torch.load(p, map_location='cpu', weights_only=True)",
        Opened::Script => "torch.jit.load(p, map_location='cpu').state_dict()",
    };
    format!(
        "python3 -c \"import os, torch, safetensors.torch as s; p = '{named}'; s.save_file({{k: v.contiguous().clone() for k, v in {load}.items()}}, os.path.join(os.path.dirname(p), '{target}'))\""
    )
}

/// Whether a file is named as one of `torch.save`.
pub(super) fn is_named(path: &Path) -> bool {
    path.extension().is_some_and(|ending| {
        ["bin", "pt", "pth"]
            .iter()
            .any(|known| ending.eq_ignore_ascii_case(known))
    })
}

/// The tensors of a file by name, with their places in it.
///
/// # Errors
/// [`WeightsError::PyTorch`] says what is wrong, and what to do.
pub(super) fn entries(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Entry>, WeightsError> {
    read(path, bytes).map_err(|problem| WeightsError::PyTorch {
        path: path.to_path_buf(),
        reason: problem.to_string(),
    })
}

fn read(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Entry>, Problem> {
    let form = |what, opened| Problem::Form {
        what,
        command: command(path, opened),
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Problem::Damaged(
            "it is a pointer of Git LFS and not the weights (`git lfs pull` brings them)"
                .to_owned(),
        ));
    }
    // The pickled number that files of PyTorch before 1.6 begin with, or the header of a tar.
    let legacy = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
    if bytes.starts_with(legacy) || bytes.get(257..262) == Some(b"ustar") {
        return Err(form(
            "in the form of torch.save before PyTorch 1.6",
            Opened::Load,
        ));
    }
    if !bytes.starts_with(b"PK\x03\x04") {
        return Err(Problem::Damaged(
            "it does not begin as a zip archive".to_owned(),
        ));
    }
    let archive = Archive::read(bytes)?;
    if archive.is_script() {
        return Err(form("a program of TorchScript", Opened::Script));
    }
    if archive.compressed {
        return Err(form("a compressed zip", Opened::Load));
    }
    if let Some(order) = archive.get("byteorder")
        && &bytes[order] != b"little"
    {
        return Err(form("of a big-endian machine", Opened::Load));
    }
    let pickle = archive
        .get("data.pkl")
        .ok_or_else(|| Problem::Damaged("it holds no `data.pkl`".to_owned()))?;
    let mut entries = BTreeMap::new();
    for (name, saved) in pickle::state_dict(&bytes[pickle])? {
        let entry = place(&archive, name, saved)?;
        if entries.insert(name.to_owned(), entry).is_some() {
            return Err(Problem::Content(format!(
                "the key `{}` is there twice",
                printable(name)
            )));
        }
    }
    Ok(entries)
}

/// Where the bytes of a tensor are, checked against its storage.
fn place(archive: &Archive<'_>, name: &str, saved: Saved<'_>) -> Result<Entry, Problem> {
    let damaged =
        |reason: String| Problem::Damaged(format!("tensor `{}`: {reason}", printable(name)));
    let size = saved.dtype.bitsize() / 8;
    let storage = match archive.get(&format!("data/{}", saved.storage)) {
        Some(storage) => storage,
        None if saved.elements == 0 => 0..0,
        None => {
            return Err(damaged(format!(
                "its storage `data/{}` is missing",
                printable(saved.storage)
            )));
        }
    };
    if Some(storage.len()) != saved.elements.checked_mul(size) {
        return Err(damaged(format!(
            "its storage `data/{}` has {} bytes, expected {} elements of {size}",
            printable(saved.storage),
            storage.len(),
            saved.elements
        )));
    }
    // Elements, and the distance from the first to the last.
    let (mut count, mut reach, mut in_order) = (1usize, 0usize, true);
    let outside = || {
        damaged(format!(
            "shape {:?} with strides {:?} from element {} reaches beyond its storage of {} elements",
            saved.shape, saved.strides, saved.offset, saved.elements
        ))
    };
    let empty = saved.shape.contains(&0);
    for (length, stride) in saved.shape.iter().zip(&saved.strides).rev() {
        if empty {
            count = 0;
            break;
        }
        if *length == 1 {
            continue;
        }
        in_order &= *stride == count;
        count = count.checked_mul(*length).ok_or_else(outside)?;
        reach = (length - 1)
            .checked_mul(*stride)
            .and_then(|more| reach.checked_add(more))
            .ok_or_else(outside)?;
    }
    let end = match empty {
        true => saved.offset,
        false => reach
            .checked_add(saved.offset)
            .and_then(|last| last.checked_add(1))
            .ok_or_else(outside)?,
    };
    // An expanded view has more elements than its storage: a small file would ask for any amount of memory.
    if end > saved.elements || count > saved.elements {
        return Err(outside());
    }
    Ok(Entry {
        dtype: saved.dtype,
        bytes: storage.start + saved.offset * size..storage.start + end * size,
        strides: (!in_order && !empty).then_some(saved.strides),
        shape: saved.shape,
    })
}

/// Copies elements of a view from `first` on in row-major order, as many as `out` holds.
///
/// `bytes` begin with the first element of the view and end with its last; elements have `size` bytes.
pub(super) fn gather(
    bytes: &[u8],
    [shape, strides]: [&[usize]; 2],
    size: usize,
    first: usize,
    out: &mut [u8],
) {
    for (number, out) in out.chunks_exact_mut(size).enumerate() {
        let (mut rest, mut at) = (first + number, 0);
        for (length, stride) in shape.iter().zip(strides).rev() {
            at += rest % length * stride;
            rest /= length;
        }
        out.copy_from_slice(&bytes[at * size..][..size]);
    }
}
