//! Data files as what reports are written about: each row with its own question, system message and images.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Result, bail};

use super::{
    args::InferArgs,
    task::{RowTask, Task},
};
use crate::{
    commands::{shipped::shipped, usage::UsageError},
    dataset::{QuestionFile, files_like, read_questions},
    study::counted,
};

/// Endings of data files, perhaps with `.gz` after them.
const ENDINGS: [&str; 7] = [
    ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".tab", ".parquet",
];

/// Whether what was named is a data file: by its name, or because it begins as JSON or Parquet does, which no image does.
pub(super) fn is_data_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.to_lowercase();
    let plain = name.strip_suffix(".gz").unwrap_or(&name);
    if ENDINGS.iter().any(|ending| plain.ends_with(ending)) {
        return true;
    }
    // A pipe would lose what is read here.
    if !path.is_file() {
        return false;
    }
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(64).read_to_end(&mut head));
    if read.is_err() || head.starts_with(b"PAR1") {
        return read.is_ok();
    }
    let text: &[u8] = match head.as_slice() {
        [0xef, 0xbb, 0xbf, rest @ ..] | [0xff, 0xfe, rest @ ..] | [0xfe, 0xff, 0, rest @ ..] => {
            rest
        }
        rest => rest,
    };
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    matches!(first, Some(b'{' | b'['))
}

/// The tasks of the data files among what was named; `None` where there are images alone.
///
/// # Errors
/// Images beside data files, a flag that has no meaning for rows, a file that cannot be read.
pub(super) fn list(args: &InferArgs) -> Result<Option<Vec<Task>>> {
    let named: Vec<PathBuf> = args.images.iter().map(|path| shipped(path)).collect();
    let is_data = named.iter().map(|path| is_data_file(path));
    let (data, images): (Vec<_>, Vec<_>) = named.iter().zip(is_data).partition(|(_, data)| *data);
    let Some((first, _)) = data.first() else {
        let options = [
            ("--columns", args.reading.columns.is_some()),
            ("--allow-image-urls", args.reading.allow_image_urls),
        ];
        return match options.iter().find(|(_, given)| *given) {
            Some((option, _)) => bail!(UsageError(format!(
                "{option} is about data files, and no data file is named"
            ))),
            None => Ok(None),
        };
    };
    if let Some((image, _)) = images.first() {
        bail!(UsageError(format!(
            "`{}` is a data file and `{}` is none; give either images or data files",
            first.display(),
            image.display()
        )));
    }
    for (option, given) in [
        ("--together", args.together),
        ("--show-tags", args.show_tags),
        ("--recursive", args.recursive),
    ] {
        if given {
            bail!(UsageError(format!(
                "{option} is about images; each row of `{}` names its own",
                first.display()
            )));
        }
    }
    let mut paths = Vec::new();
    for path in &named {
        paths.extend(files_like(path)?);
    }
    let files = read_questions(&paths, &args.reading.options(), args.prompt())?;
    let mut tasks = Vec::new();
    for file in files {
        say_remarks(&file);
        tasks.extend(of_file(file));
    }
    check_prompt(args, &tasks)?;
    say_choices(args, &tasks);
    Ok(Some(tasks))
}

fn of_file(file: QuestionFile) -> impl Iterator<Item = Task> {
    let path: Arc<Path> = file.path.into();
    file.rows.into_iter().map(move |(number, row)| {
        let folder = path.parent().unwrap_or(Path::new(""));
        let images = row.as_ref().map_or_else(
            |_| Vec::new(),
            |question| question.sample.image_paths(folder),
        );
        let question = row.map(Arc::new).map_err(|error| error.to_string().into());
        let file = path.clone();
        let row = Some(RowTask {
            file,
            number,
            question,
        });
        Task { images, row }
    })
}

fn say_remarks(file: &QuestionFile) {
    for remark in &file.remarks {
        eprintln!("`{}`: {remark}", file.path.display());
    }
}

/// Refuses a question that no row takes.
fn check_prompt(args: &InferArgs, tasks: &[Task]) -> Result<()> {
    let mut questions = tasks.iter().filter_map(Task::question);
    if args.prompt.is_some() && !questions.any(|question| question.has_standard_question()) {
        bail!(UsageError(
            "--prompt is the question of rows without one, and every row has its own".into()
        ));
    }
    Ok(())
}

/// Says what of the rows is not shown to the model, and which of them keep what flags say otherwise.
fn say_choices(args: &InferArgs, tasks: &[Task]) {
    let questions = || tasks.iter().filter_map(Task::question);
    let answered = questions().filter(|question| question.reference().is_some());
    match answered.count() {
        0 => {}
        count => eprintln!(
            "{} an answer, which the model is not shown and the record has as `reference`",
            counted(count, "row has", "rows have")
        ),
    }
    let own =
        |has: fn(&crate::dataset::Question) -> bool| questions().filter(|one| has(one)).count();
    for (given, count, what) in [
        (
            args.system.is_some(),
            own(|question| question.system().is_some()),
            "system message",
        ),
        (
            args.prompt.is_some(),
            own(|question| !question.has_standard_question()),
            "question",
        ),
    ] {
        if given && count > 0 {
            eprintln!(
                "{} {} own {what}",
                counted(count, "row", "rows"),
                if count == 1 {
                    "keeps its"
                } else {
                    "keep their"
                }
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_files_are_told_from_images() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes, is_data) in [
            ("a.jsonl", &b""[..], true),
            ("a.CSV.gz", b"", true),
            ("a.nii.gz", b"\x1f\x8b", false),
            ("a.png", b"\x89PNG", false),
            ("rows", b" \n{\"image\"", true),
            ("rows.txt", b"\xef\xbb\xbf[", true),
            ("rows.u16", b"\xff\xfe{\0", true),
            ("rows.b16", b"\xfe\xff\0{", true),
            ("a.bin", b"PAR1", true),
            ("a.txt", b"hello", false),
            ("empty", b"", false),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(is_data_file(&path), is_data, "{name}");
        }
        assert!(is_data_file(Path::new("none.parquet")));
        assert!(!is_data_file(dir.path()));
    }
}
