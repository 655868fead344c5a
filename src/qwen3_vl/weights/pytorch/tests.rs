//! Files of real PyTorch that are cut, changed or refused, and hostile ones made here.

use std::{
    fs,
    io::{Seek, SeekFrom, Write},
    path::PathBuf,
};

use rand::{Rng, SeedableRng};

use super::*;
use crate::qwen3_vl::weights::TensorFile;
use burn::tensor::DType;

fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/pytorch");
    folder.join(name)
}

fn problem(bytes: &[u8]) -> String {
    match entries(Path::new("x/pytorch_model.bin"), bytes) {
        Ok(entries) => panic!("{} tensors are taken", entries.len()),
        Err(error) => error.to_string(),
    }
}

fn assert_says(what: &str, bytes: &[u8], piece: &str) {
    let text = problem(bytes);
    assert!(text.contains(piece), "{what}: {text}");
    assert!(text.contains("x/pytorch_model.bin"), "{what}: {text}");
    assert!(text.len() < 700, "{what}: {} bytes", text.len());
}

/// Little-endian fields of a record.
fn fields(signature: &[u8; 4], fields: &[(u64, usize)]) -> Vec<u8> {
    let mut bytes = signature.to_vec();
    for (value, length) in fields {
        bytes.extend(&value.to_le_bytes()[..*length]);
    }
    bytes
}

fn local(name: &str, length: u64) -> Vec<u8> {
    let length = (length.min(u32::MAX.into()), 4);
    let head = [(45, 2), (0, 2), (0, 2), (0, 4), (0, 4), length, length];
    let mut record = fields(b"PK\x03\x04", &head);
    record.extend(fields(&[name.len() as u8, 0, 0, 0], &[]));
    record.extend(name.as_bytes());
    record
}

fn central(name: &str, length: u64, at: u64) -> Vec<u8> {
    let sizes = fields(b"\x01\x00\x18\x00", &[(length, 8), (length, 8), (at, 8)]);
    let full = (u32::MAX.into(), 4);
    let head = [(45, 2), (45, 2), (0, 2), (0, 2), (0, 4), (0, 4), full, full];
    let mut record = fields(b"PK\x01\x02", &head);
    let name_length = (name.len() as u64, 2);
    let rest = [name_length, (28, 2), (0, 2), (0, 2), (0, 2), (0, 4), full];
    record.extend(&fields(b"    ", &rest)[4..]);
    record.extend(name.as_bytes());
    record.extend(sizes);
    record
}

/// The records after the directory, for one of `length` bytes from `at` on.
fn ends(count: u64, at: u64, length: u64) -> Vec<u8> {
    let head = [(44, 8), (45, 2), (45, 2), (0, 4), (0, 4)];
    let mut records = fields(b"PK\x06\x06", &head);
    for value in [count, count, length, at] {
        records.extend(value.to_le_bytes());
    }
    records.extend(fields(b"PK\x06\x07", &[(0, 4), (at + length, 8), (1, 4)]));
    records.extend(fields(
        b"PK\x05\x06",
        &[(0, 4), (u64::MAX, 4), (u64::MAX, 8), (0, 2)],
    ));
    records
}

/// Name, length and place of each entry of a directory.
type Listed = Vec<(String, u64, u64)>;

/// An archive with these entries, and a directory of them after `listed` has changed it.
fn archive_with(files: &[(&str, &[u8])], listed: impl Fn(&mut Listed)) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in files {
        directory.push((name.to_string(), data.len() as u64, bytes.len() as u64));
        bytes.extend(local(name, data.len() as u64));
        bytes.extend(*data);
    }
    listed(&mut directory);
    let start = bytes.len();
    for (name, length, at) in &directory {
        bytes.extend(central(name, *length, *at));
    }
    let length = bytes.len() - start;
    bytes.extend(ends(directory.len() as u64, start as u64, length as u64));
    bytes
}

fn archive(pickle: &[u8], data: &[u8]) -> Vec<u8> {
    archive_with(&[("a/data.pkl", pickle), ("a/data/0", data)], |_| ())
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = fields(b"X   ", &[(text.len() as u64, 4)]);
    bytes.drain(1..4);
    bytes.extend(text.as_bytes());
    bytes
}

fn int(value: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &value.to_le_bytes()].concat()
}

fn ints(values: &[i64]) -> Vec<u8> {
    let values: Vec<Vec<u8>> = values.iter().map(|value| int(*value)).collect();
    [b"(".to_vec(), values.concat(), b"t".to_vec()].concat()
}

/// A state dict with the tensor `w` of type f32.
fn pickle_of(elements: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    [
        b"\x80\x02}".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        int(elements),
        b"tQ".to_vec(),
        int(offset),
        ints(shape),
        ints(strides),
        b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
    ]
    .concat()
}

#[test]
fn sizes_are_checked_against_the_storage() {
    let data = [0; 24];
    let good = archive(&pickle_of(6, 0, &[2, 3], &[3, 1]), &data);
    let found = entries(Path::new("x.bin"), &good).unwrap();
    assert_eq!(
        (found["w"].bytes.len(), found["w"].strides.is_none()),
        (24, true)
    );
    let turned = archive(&pickle_of(6, 0, &[3, 2], &[1, 3]), &data);
    let found = entries(Path::new("x.bin"), &turned).unwrap();
    assert_eq!(found["w"].strides, Some(vec![1, 3]));
    let empty = archive(&pickle_of(6, 6, &[0, 1 << 50], &[1 << 50, 1]), &data);
    assert!(
        entries(Path::new("x.bin"), &empty).unwrap()["w"]
            .bytes
            .is_empty()
    );

    let max = i64::MAX;
    for (elements, offset, shape, strides, piece) in [
        (7, 0, [2, 3], [3, 1], "24 bytes, expected 7 elements"),
        (
            1 << 40,
            0,
            [1 << 20, 1 << 20],
            [1 << 20, 1],
            "24 bytes, expected",
        ),
        (max, 0, [2, 3], [3, 1], "24 bytes, expected"),
        (6, 1, [2, 3], [3, 1], "reaches beyond its storage"),
        (6, max, [2, 3], [3, 1], "reaches beyond its storage"),
        (6, 0, [3, 3], [3, 1], "reaches beyond its storage"),
        (6, 0, [2, 3], [max, max], "reaches beyond its storage"),
        (6, 0, [max, max], [max, 1], "reaches beyond its storage"),
        // Expanded: 8 GB out of one element.
        (
            6,
            0,
            [1 << 20, 1 << 11],
            [0, 0],
            "reaches beyond its storage",
        ),
        (6, 7, [0, 3], [3, 1], "reaches beyond its storage"),
        (6, 0, [-1, 3], [3, 1], "size -1"),
        (6, -1, [2, 3], [3, 1], "size -1"),
    ] {
        let bytes = archive(&pickle_of(elements, offset, &shape, &strides), &data);
        assert_says(
            &format!("{elements} {offset} {shape:?} {strides:?}"),
            &bytes,
            piece,
        );
    }
    let fewer = archive(&pickle_of(6, 0, &[2, 3], &[3]), &data);
    assert_says("fewer strides", &fewer, "more sizes than strides");
    let many = archive(&pickle_of(6, 0, &[1; 17], &[1; 17]), &data);
    assert_says("dimensions", &many, "17 dimensions");
}

#[test]
fn the_directory_is_checked_against_the_file() {
    let pickle = pickle_of(6, 0, &[2, 3], &[3, 1]);
    let data = [0; 24];
    let files = [
        ("a/data.pkl", pickle.as_slice()),
        ("a/data/0", data.as_slice()),
    ];
    let missing = archive_with(&files[..1], |_| ());
    assert_says("missing", &missing, "its storage `data/0` is missing");
    assert_says(
        "no pickle",
        &archive_with(&files[1..], |_| ()),
        "no `data.pkl`",
    );
    let says = |piece: &str, listed: &dyn Fn(&mut Listed)| {
        assert_says(piece, &archive_with(&files, listed), piece);
    };
    says("more than the file", &|all| all[1].1 += 1);
    says("more than the file", &|all| all[1].1 = u64::MAX);
    says("beyond the end", &|all| all[1].2 = u64::MAX / 2);
    says("is not where the directory says", &|all| all[1].2 += 1);
    says("is not where the directory says", &|all| {
        all[1].0 = "a/data/1".into()
    });
    says("is there twice", &|all| all.push(all[1].clone()));
    // The first entry swallows the second.
    says("overlap", &|all| all[0].1 = all[1].2 - 30);

    let whole = archive(&pickle, &data);
    let mut longer = whole.clone();
    longer.push(0);
    assert_says("longer", &longer, "does not end with the directory");
    let end = whole.len() - 22 - 20 - 56;
    for (place, value) in [(48, 1u64), (40, u64::MAX), (32, 1 << 40), (32, 1), (4, 45)] {
        let mut changed = whole.clone();
        changed[end + place..][..8].copy_from_slice(&value.to_le_bytes());
        assert!(problem(&changed).contains("torch.save"), "{place} {value}");
    }
}

#[test]
fn a_pickle_builds_a_state_dict_and_nothing_else() {
    let opened = |pickle: &[u8]| problem(&archive(pickle, &[0; 24]));
    let stack_global = [&b"\x80\x04\x8c\x05posix\x8c\x06system\x93."[..]].concat();
    let long = format!("c{}\nf\n.", "x".repeat(900));
    let cases: &[(&[u8], &str)] = &[
        (
            b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.",
            "`posix.system`",
        ),
        (&stack_global, "`posix.system`"),
        (b"\x80\x02cbuiltins\neval\n.", "would run code"),
        (b"\x80\x02ctorch\nload\n.", "would run code"),
        (b"\x80\x02cc\x1b[31m\nx\n.", "\\u{1b}"),
        (long.as_bytes(), "would run code"),
        // INST, OBJ, NEWOBJ, EXT1, REDUCE of what is no function.
        (b"(iposix\nsystem\n.", "would run code"),
        (b"(o.", "would run code"),
        (b")\x81.", "would run code"),
        (b"\x82\x01.", "would run code"),
        (b"N)R.", "calls what is no function"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "other arguments"),
        (b"Nb.", "takes a value that is not there"),
        (b"NNb.", "no dict"),
        (b"}", "ends inside a value"),
        (b"", "ends inside a value"),
        (b"}.}.", "does not end with one value"),
        (b"}}.", "does not end with one value"),
        (b"(}.", "does not end with one value"),
        (b"N.", "holds no dict"),
        (b"t.", "a mark that is not there"),
        (b"N(\x85.", "takes a value that is not there"),
        (b"h\x07.", "recalls a value"),
        (b"}(Nu.", "a key without a value"),
        (b"}Q.", "no tuple"),
        (b")Q.", "something else than a storage"),
        (b"X\xff\xff\xff\xffab.", "ends inside a value"),
        (
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffab.",
            "ends inside a value",
        ),
        (b"\x8a\x09123456789.", "more than 64 bits"),
        (b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"\x80\x01.", "protocol 1"),
        (b"}NNs.", "a key is no text"),
        (b"}X\x01\x00\x00\x00w}s.", "`w` holds no tensor"),
    ];
    for (pickle, piece) in cases {
        let text = opened(pickle);
        assert!(text.contains(piece), "{}: {text}", pickle.escape_ascii());
        assert!(text.len() < 700, "{text}");
    }
    // A dict in itself, as deep as marks go, as high as the stack, as long as the count of opcodes.
    assert!(opened(b"}q\x00X\x01\x00\x00\x00wh\x00s.").contains("holds no tensor"));
    assert!(opened(&vec![b'('; 1 << 20]).contains("too deeply"));
    assert!(opened(&vec![b'N'; 1 << 20]).contains("too deeply"));
    let growing = [&b"N"[..], &b"\x85".repeat(1 << 21), b"."].concat();
    assert!(opened(&growing).contains("more than 1000000 opcodes"));
    // The same key twice; any text before it is kept short.
    let one = pickle_of(6, 0, &[2, 3], &[3, 1]);
    let twice = [&one[..one.len() - 1], &one[3..]].concat();
    assert!(
        opened(&twice).contains("`w` is there twice"),
        "{}",
        opened(&twice)
    );
}

#[test]
fn other_forms_are_refused_with_the_command_that_converts_them() {
    for (name, pieces) in [
        ("legacy", ["before PyTorch 1.6", "weights_only=True"]),
        ("script", ["a program of TorchScript", "torch.jit.load"]),
        ("compressed", ["a compressed zip", "weights_only=True"]),
        ("command", ["`posix.system`", "would run code"]),
        ("float8", ["torch._utils._rebuild_tensor_v3", "safetensors"]),
        ("trainer", ["`epoch` holds no tensor", "state dict"]),
    ] {
        let bytes = fs::read(fixture(&format!("refused/{name}.bin"))).unwrap();
        for piece in pieces {
            assert_says(name, &bytes, piece);
        }
        assert_eq!(
            problem(&bytes).contains("python3 -c"),
            ["legacy", "script", "compressed"].contains(&name),
            "{name}"
        );
    }
    assert!(!Path::new("ran-by-a-pickle").exists());
    assert_says(
        "tar",
        &[&[0; 257][..], b"ustar\0"].concat(),
        "before PyTorch 1.6",
    );
    assert_says(
        "pointer",
        b"version https://git-lfs.github.com/spec/v1\n",
        "git lfs pull",
    );
    assert_says("text", b"<html>", "does not begin as a zip");
    assert_says("nothing", b"", "does not begin as a zip");

    let of = |path: &str| command(Path::new(path), Opened::Load);
    assert!(of("m/pytorch_model-00001-of-00002.bin").contains("from_pretrained('m'"));
    assert!(of("m/adapter_model.bin").contains("'adapter_model.safetensors'"));
    // A name cannot end the quotes.
    for path in [
        "a'; x/w.bin",
        "a\"; x/w.bin",
        "$(x)/w.bin",
        "`x`/pytorch_model-1.bin",
    ] {
        assert!(
            !of(path).contains('x') || !of(path).contains(path),
            "{}",
            of(path)
        );
        assert!(
            of(path).contains("FILE") || of(path).contains("DIR"),
            "{}",
            of(path)
        );
    }
}

/// Opens and reads all there is; what is taken has no more elements than the file has bytes.
fn take_all(path: &Path, length: usize) -> Result<(), WeightsError> {
    let file = TensorFile::open(path)?;
    for (name, shape) in file.shapes()? {
        assert!(
            shape.iter().product::<usize>() <= length,
            "{name} {shape:?}"
        );
        // A changed weight may be no number.
        let _ = file.read(&name, DType::F32);
    }
    Ok(())
}

#[test]
fn cut_and_changed_files_are_errors_or_of_bounded_size() {
    let whole = fs::read(fixture("pytorch_model-00002-of-00002.bin")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pytorch_model.bin");
    for sixteenth in 0..16 {
        fs::write(&path, &whole[..whole.len() * sixteenth / 16]).unwrap();
        let error = take_all(&path, whole.len()).unwrap_err().to_string();
        assert!(error.contains("pytorch_model.bin"), "{error}");
    }
    let pickle = Archive::read(&whole).unwrap().get("data.pkl").unwrap();
    let directory = whole
        .windows(4)
        .position(|bytes| bytes == b"PK\x01\x02")
        .unwrap();
    let mut random = rand::rngs::SmallRng::seed_from_u64(5);
    let mut refused = 0;
    for number in 0..200 {
        let mut changed = whole.clone();
        for _ in 0..random.random_range(1..4) {
            let at = match number % 4 {
                0 | 1 => random.random_range(pickle.clone()),
                2 => random.random_range(directory..whole.len()),
                _ => random.random_range(0..whole.len()),
            };
            changed[at] = random.random();
        }
        fs::write(&path, &changed).unwrap();
        refused += usize::from(take_all(&path, whole.len()).is_err());
    }
    // The others changed a weight, a name, a time or a checksum.
    assert!(refused > 80, "{refused} of 200 are refused");
    fs::write(&path, &whole).unwrap();
    take_all(&path, whole.len()).unwrap();
}

/// Places that need more than 32 bits, in a file that is mostly a hole.
#[test]
fn files_above_four_gigabytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pytorch_model.bin");
    let mut file = fs::File::create(&path).unwrap();
    let elements = (1u64 << 30) + 2;
    let pickle = pickle_of(elements as i64, 1 << 30, &[2, 1], &[1, 1]);
    let head = local("a/data/0", 4 * elements);
    let after = head.len() as u64 + 4 * elements;
    file.write_all(&head).unwrap();
    file.seek(SeekFrom::Start(after - 8)).unwrap();
    file.write_all(bytemuck::cast_slice(&[1.5f32, -2.5]))
        .unwrap();
    file.write_all(&local("a/data.pkl", pickle.len() as u64))
        .unwrap();
    file.write_all(&pickle).unwrap();
    let at = file.stream_position().unwrap();
    let directory = [
        central("a/data/0", 4 * elements, 0),
        central("a/data.pkl", pickle.len() as u64, after),
    ]
    .concat();
    file.write_all(&directory).unwrap();
    file.write_all(&ends(2, at, directory.len() as u64))
        .unwrap();
    drop(file);
    let read = TensorFile::open(&path)
        .unwrap()
        .read("w", DType::F32)
        .unwrap();
    assert_eq!(read.to_vec::<f32>().unwrap(), [1.5, -2.5]);
}
