//! A file of records, one a line, that is appended to, repaired and cleared of what was redone.
//!
//! Knows no fields of a record: a function says what a line is. While a run goes on the file is only
//! appended to, so that a kill costs at most the line being written.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Longest line that can be a record, in bytes.
const LONGEST_LINE: u64 = 16 << 20;

/// Damage after which a file that holds less of records is another file.
const MOST_DAMAGE: u64 = 64 << 20;

/// What a line is.
pub(super) enum LineKind<K> {
    /// A record that later ones with the same key replace.
    Keyed(K),
    /// A record of another run, left as it is.
    Other,
    /// No record.
    Damaged,
}

struct JournalLine<K> {
    start: u64,
    length: u64,
    key: Option<K>,
}

/// A part of the file that is no record, at most a line long.
struct DamagedPiece {
    /// Line of the file, from 1.
    row: usize,
    start: u64,
    length: u64,
}

/// What a file holds.
struct Scanned<K> {
    lines: Vec<JournalLine<K>>,
    /// Bytes up to the last line that has its end.
    length: u64,
    damaged: Vec<DamagedPiece>,
    repair: Repair,
}

impl<K> Default for Scanned<K> {
    fn default() -> Self {
        Self {
            lines: Vec::new(),
            length: 0,
            damaged: Vec::new(),
            repair: Repair::default(),
        }
    }
}

/// A file of lines that was written under another name.
struct Rewritten<K> {
    file: File,
    lines: Vec<JournalLine<K>>,
    length: u64,
}

/// What had to be mended when a file was opened.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Repair {
    /// Lines that are no records, from 1; they were moved to the file of this name.
    pub(super) damaged: Option<(Vec<usize>, PathBuf)>,
    /// A last record without its end was taken away.
    pub(super) cut: bool,
    /// Zero bytes at the end, as a power cut leaves them, were taken away.
    pub(super) zeros: u64,
}

/// Why a file cannot be taken for one of records.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    #[error(
        "`{}` is being written by another run; wait for it, or name another file with --output",
        .0.display()
    )]
    Locked(PathBuf),
    #[error(
        "`{}`, line {line}: not a record of a batch run; name another file with --output",
        .path.display()
    )]
    Foreign { path: PathBuf, line: usize },
    #[error("cannot read `{}`: {cause}", .path.display())]
    Read { path: PathBuf, cause: io::Error },
    #[error("cannot write `{}`: {cause}", .path.display())]
    Write { path: PathBuf, cause: io::Error },
}

/// An open file of records, locked against other runs.
pub(super) struct Journal<K> {
    /// As it was named.
    name: PathBuf,
    /// Without links: what is renamed must be the file itself.
    path: PathBuf,
    file: File,
    lines: Vec<JournalLine<K>>,
    length: u64,
    /// Files that were replaced; their locks are held to the end.
    replaced: Vec<File>,
}

impl<K: Clone + Eq + std::hash::Hash> Journal<K> {
    /// Opens or makes the file and mends it: a last line that was cut off or zeroed is taken away, lines
    /// that are no records are moved to `NAME.damaged`.
    ///
    /// `start` is how every record begins.
    ///
    /// # Errors
    /// [`JournalError`]; a file with more other lines than records stays untouched.
    pub(super) fn open(
        name: &Path,
        start: &[u8],
        kind: &mut dyn FnMut(&[u8]) -> LineKind<K>,
    ) -> Result<(Self, Repair), JournalError> {
        let write = |cause| JournalError::Write {
            path: name.to_path_buf(),
            cause,
        };
        let file = fs::OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(name)
            .map_err(write)?;
        // The system's lock: it ends with the process, however that ends.
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            return Err(JournalError::Locked(name.to_path_buf()));
        }
        let mut this = Self {
            name: name.to_path_buf(),
            path: fs::canonicalize(name).map_err(write)?,
            file,
            lines: Vec::new(),
            length: 0,
            replaced: Vec::new(),
        };
        let repair = this.scan(start, kind)?;
        Ok((this, repair))
    }

    fn foreign(&self, line: usize) -> JournalError {
        JournalError::Foreign {
            path: self.name.clone(),
            line,
        }
    }

    fn read_error(&self, cause: io::Error) -> JournalError {
        JournalError::Read {
            path: self.name.clone(),
            cause,
        }
    }

    fn write_error(&self, cause: io::Error) -> JournalError {
        JournalError::Write {
            path: self.name.clone(),
            cause,
        }
    }

    /// Reads all lines and mends the file.
    fn scan(
        &mut self,
        start: &[u8],
        kind: &mut dyn FnMut(&[u8]) -> LineKind<K>,
    ) -> Result<Repair, JournalError> {
        let Scanned {
            lines,
            length,
            damaged,
            mut repair,
        } = self.read_lines(start, kind)?;
        let mut rows: Vec<usize> = damaged.iter().map(|piece| piece.row).collect();
        rows.dedup();
        if rows.len() > lines.len() || (lines.is_empty() && repair.zeros > 0) {
            return Err(self.foreign(rows.first().copied().unwrap_or(1)));
        }
        self.lines = lines;
        self.length = length;
        if !damaged.is_empty() {
            let aside = self.beside(".damaged");
            let ranges = damaged.iter().map(|piece| (piece.start, piece.length));
            self.move_aside(ranges, &aside)?;
            repair.damaged = Some((rows, aside));
            self.rewrite((0..self.lines.len()).collect())?;
        } else if repair.cut || repair.zeros > 0 {
            self.file
                .set_len(self.length)
                .map_err(|cause| self.write_error(cause))?;
        }
        let end = self.file.seek(SeekFrom::End(0));
        end.map_err(|cause| self.write_error(cause))?;
        Ok(repair)
    }

    fn read_lines(
        &self,
        start: &[u8],
        kind: &mut dyn FnMut(&[u8]) -> LineKind<K>,
    ) -> Result<Scanned<K>, JournalError> {
        let mut reader = BufReader::with_capacity(1 << 16, &self.file);
        let mut scanned = Scanned::default();
        let (mut good, mut bad, mut row, mut whole) = (0, 0, 1, true);
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = (&mut reader)
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut line)
                .map_err(|cause| self.read_error(cause))? as u64;
            if length == 0 {
                return Ok(scanned);
            }
            let ended = line.last() == Some(&b'\n');
            let begun = std::mem::replace(&mut whole, ended);
            let found = match (begun, ended) {
                (true, true) => kind(&line[..line.len() - 1]),
                _ => LineKind::Damaged,
            };
            let last = line.iter().rposition(|byte| *byte != 0);
            let rest = &line[..last.map_or(0, |last| last + 1)];
            let record = |key| JournalLine {
                start: scanned.length,
                length,
                key,
            };
            match found {
                LineKind::Keyed(key) => scanned.lines.push(record(Some(key))),
                LineKind::Other => scanned.lines.push(record(None)),
                // The end of the file: a record that was cut off, or zeros in its place.
                LineKind::Damaged
                    if begun
                        && !ended
                        && length < LONGEST_LINE
                        && (rest.starts_with(start) || start.starts_with(rest)) =>
                {
                    scanned.repair.cut = !rest.is_empty();
                    scanned.repair.zeros = length - rest.len() as u64;
                    return Ok(scanned);
                }
                LineKind::Damaged => scanned.damaged.push(DamagedPiece {
                    row,
                    start: scanned.length,
                    length,
                }),
            }
            match scanned.lines.last() {
                Some(last) if last.start == scanned.length => good += length,
                _ => bad += length,
            }
            if bad > MOST_DAMAGE.max(good) {
                return Err(self.foreign(scanned.damaged.first().map_or(row, |first| first.row)));
            }
            scanned.length += length;
            row += usize::from(ended);
        }
    }

    /// Appends a record at once, so that an interruption loses nothing that was finished.
    pub(super) fn add(&mut self, key: K, mut text: String) -> Result<(), JournalError> {
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .map_err(|cause| self.write_error(cause))?;
        let length = text.len() as u64;
        self.lines.push(JournalLine {
            start: self.length,
            length,
            key: Some(key),
        });
        self.length += length;
        Ok(())
    }

    /// Puts the last record of each key where its first one was; earlier ones that `keep` wants are
    /// moved to `NAME.replaced`. Returns how many were replaced.
    pub(super) fn replace_earlier(
        &mut self,
        keep: &dyn Fn(&[u8], &[u8]) -> bool,
    ) -> Result<usize, JournalError> {
        let mut by_key: HashMap<&K, Vec<usize>> = HashMap::new();
        for (index, line) in self.lines.iter().enumerate() {
            if let Some(key) = &line.key {
                by_key.entry(key).or_default().push(index);
            }
        }
        let redone: Vec<Vec<usize>> = by_key
            .into_values()
            .filter(|places| places.len() > 1)
            .collect();
        if redone.is_empty() {
            return Ok(0);
        }
        let mut order: Vec<Option<usize>> = (0..self.lines.len()).map(Some).collect();
        let mut earlier = Vec::new();
        for places in redone {
            let (first, last) = (places[0], places[places.len() - 1]);
            places.iter().for_each(|place| order[*place] = None);
            order[first] = Some(last);
            earlier.extend(places[..places.len() - 1].iter().map(|one| (*one, last)));
        }
        earlier.sort_unstable();
        let mut wanted = Vec::new();
        for (one, last) in &earlier {
            if keep(&self.text(*one)?, &self.text(*last)?) {
                let line = &self.lines[*one];
                wanted.push((line.start, line.length));
            }
        }
        if !wanted.is_empty() {
            let aside = self.beside(".replaced");
            self.move_aside(wanted.into_iter(), &aside)?;
        }
        self.rewrite(order.into_iter().flatten().collect())?;
        Ok(earlier.len())
    }

    fn text(&mut self, line: usize) -> Result<Vec<u8>, JournalError> {
        let JournalLine { start, length, .. } = self.lines[line];
        self.bytes(start, length)
    }

    fn bytes(&mut self, start: u64, length: u64) -> Result<Vec<u8>, JournalError> {
        let mut bytes = vec![0; length as usize];
        let file = &mut self.file;
        file.seek(SeekFrom::Start(start))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|cause| self.read_error(cause))?;
        Ok(bytes)
    }

    /// `NAME` and an ending, beside the file.
    fn beside(&self, ending: &str) -> PathBuf {
        let mut name = self.name.as_os_str().to_owned();
        name.push(ending);
        name.into()
    }

    /// Appends pieces of the file to another.
    fn move_aside(
        &mut self,
        ranges: impl Iterator<Item = (u64, u64)>,
        aside: &Path,
    ) -> Result<(), JournalError> {
        let failed = |cause| JournalError::Write {
            path: aside.to_path_buf(),
            cause,
        };
        let mut out = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(aside)
            .map_err(failed)?;
        for (start, length) in ranges {
            out.write_all(&self.bytes(start, length)?).map_err(failed)?;
        }
        out.sync_all().map_err(failed)
    }

    /// Replaces the file by one of these lines in this order.
    fn rewrite(&mut self, order: Vec<usize>) -> Result<(), JournalError> {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".tmp-{}", std::process::id()));
        let temporary = PathBuf::from(name);
        let written = self.write_lines(&temporary, &order);
        let Rewritten {
            file,
            lines,
            length,
        } = match written {
            Ok(written) => written,
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                return Err(error);
            }
        };
        self.replaced.push(std::mem::replace(&mut self.file, file));
        self.lines = lines;
        self.length = length;
        Ok(())
    }

    fn write_lines(
        &mut self,
        temporary: &Path,
        order: &[usize],
    ) -> Result<Rewritten<K>, JournalError> {
        let failed = |cause| JournalError::Write {
            path: temporary.to_path_buf(),
            cause,
        };
        let file = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(temporary)
            .map_err(failed)?;
        // Locked before it has the name, so that no other run can come in between.
        let _ = file.try_lock();
        let mut out = io::BufWriter::with_capacity(1 << 16, &file);
        let (mut lines, mut length) = (Vec::with_capacity(order.len()), 0);
        for index in order {
            let text = self.text(*index)?;
            out.write_all(&text).map_err(failed)?;
            lines.push(JournalLine {
                start: length,
                length: text.len() as u64,
                key: self.lines[*index].key.clone(),
            });
            length += text.len() as u64;
        }
        out.flush().map_err(failed)?;
        drop(out);
        file.sync_all().map_err(failed)?;
        fs::rename(temporary, &self.path).map_err(failed)?;
        Ok(Rewritten {
            file,
            lines,
            length,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `k=v` lines: the key decides, `x…` belongs to another run.
    fn kind(line: &[u8]) -> LineKind<u8> {
        match line {
            [b'x', ..] => LineKind::Other,
            [b'=', key, _] => LineKind::Keyed(*key),
            _ => LineKind::Damaged,
        }
    }

    fn open(path: &Path) -> Result<(Journal<u8>, Repair), JournalError> {
        Journal::open(path, b"=", &mut kind)
    }

    fn opened(content: &[u8]) -> (tempfile::TempDir, Journal<u8>, Repair) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        fs::write(&path, content).unwrap();
        let (journal, repair) = open(&path).unwrap();
        (dir, journal, repair)
    }

    #[test]
    fn good_records_are_kept_and_damaged_lines_moved() {
        let (dir, mut journal, repair) = opened(b"=a1\n??\nx\n=b1\n\0\0=c");
        let aside = dir.path().join("r.damaged");
        // The last line begins with zeros: neither a record that was cut off nor zeros alone.
        assert_eq!(repair.damaged, Some((vec![2, 5], aside.clone())));
        journal.add(b'c', "=c1".into()).unwrap();
        assert_eq!(
            fs::read(dir.path().join("r")).unwrap(),
            b"=a1\nx\n=b1\n=c1\n"
        );
        assert_eq!(fs::read(aside).unwrap(), b"??\n\0\0=c");
    }

    #[test]
    fn zeros_of_a_power_cut_are_taken_away() {
        let (dir, _journal, repair) = opened(&[&b"=a1\n=b"[..], &[0; 4096]].concat());
        let expected = Repair {
            cut: true,
            zeros: 4096,
            ..Repair::default()
        };
        assert_eq!(repair, expected);
        assert_eq!(fs::read(dir.path().join("r")).unwrap(), b"=a1\n");
    }

    #[test]
    fn a_record_that_was_redone_takes_the_place_of_the_first() {
        let (dir, mut journal, _) = opened(b"=a1\nx\n=b1\n=c1\n");
        journal.add(b'a', "=a2".into()).unwrap();
        journal.add(b'b', "=b1".into()).unwrap();
        assert_eq!(
            journal.replace_earlier(&|one, last| one != last).unwrap(),
            2
        );
        journal.add(b'd', "=d1".into()).unwrap();
        let text = fs::read(dir.path().join("r")).unwrap();
        assert_eq!(text, b"=a2\nx\n=b1\n=c1\n=d1\n");
        assert_eq!(fs::read(dir.path().join("r.replaced")).unwrap(), b"=a1\n");
        assert_eq!(journal.replace_earlier(&|_, _| true).unwrap(), 0);
        // The new file is locked as the old one was.
        assert!(matches!(
            open(&dir.path().join("r")),
            Err(JournalError::Locked(_))
        ));
    }

    #[test]
    fn another_file_is_refused_and_a_huge_one_not_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        for (content, line) in [
            (&b"note\n"[..], 1),
            (b"\0\0\0", 1),
            (b"=a1\nnote\nnote\n", 2),
            (b"note", 1),
        ] {
            fs::write(&path, content).unwrap();
            let error = open(&path).err().unwrap().to_string();
            assert!(error.contains(&format!("line {line}: ")), "{error}");
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        let huge = File::create(&path).unwrap();
        huge.set_len(1 << 40).unwrap();
        let started = std::time::Instant::now();
        assert!(matches!(open(&path), Err(JournalError::Foreign { .. })));
        assert!(started.elapsed().as_secs() < 20);
        let (journal, repair) = {
            fs::write(&path, b"").unwrap();
            open(&path).unwrap()
        };
        assert_eq!((journal.length, repair), (0, Repair::default()));
    }
}
