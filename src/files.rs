//! temp
use std::io::Write; use std::path::{Path,PathBuf};
/// e
#[derive(Debug, thiserror::Error)]
pub enum FileError { /// w
 #[error("cannot write `{}`: {cause}", .path.display())] Write{ /// p
 path: PathBuf, /// c
 cause: std::io::Error } }
/// w
pub fn write_atomic(path:&Path, f: impl FnOnce(&mut dyn Write)->std::io::Result<()>)->Result<(),FileError>{ let mut o=std::io::BufWriter::new(std::fs::File::create(path).map_err(|cause|FileError::Write{path:path.into(),cause})?); f(&mut o).and_then(|_|o.flush()).map_err(|cause|FileError::Write{path:path.into(),cause}) }
