//! Pictures, requests and output files that cannot be used.

use std::{fs, path::Path};

use image::{GrayImage, Luma};
use serde_json::Value;
use tempfile::tempdir;

use crate::{
    demo_image, fixture_image, infer,
    refusal::{Case, case, check, refusal_problems},
    run, text,
};

/// One chunk of a PNG, with its checksum.
fn png_chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(kind);
    crc.update(data);
    let mut chunk = (data.len() as u32).to_be_bytes().to_vec();
    chunk.extend_from_slice(kind);
    chunk.extend_from_slice(data);
    chunk.extend_from_slice(&crc.sum().to_be_bytes());
    chunk
}

/// A PNG of a hundred bytes that claims a size.
fn png_that_claims(width: u32, height: u32) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend_from_slice(&width.to_be_bytes());
    header.extend_from_slice(&height.to_be_bytes());
    // 8-bit RGB, no interlacing.
    header.extend_from_slice(&[8, 2, 0, 0, 0]);
    let no_pixels = [0x78, 0x9c, 0x03, 0, 0, 0, 0, 1];
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    file.extend(png_chunk(b"IHDR", &header));
    file.extend(png_chunk(b"IDAT", &no_pixels));
    file.extend(png_chunk(b"IEND", &[]));
    file
}

fn write_gray(path: &Path, width: u32, height: u32) {
    GrayImage::from_fn(width, height, |x, y| Luma([((x / 8 + y) % 256) as u8]))
        .save(path)
        .unwrap();
}

#[test]
fn a_picture_that_cannot_be_used_is_named() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let demo = fs::read(demo_image()).unwrap();
    fs::write(path("words.png"), "this is no picture\n").unwrap();
    fs::write(path("picture.avif"), b"\0\0\0\x1cftypavif\0\0\0\0").unwrap();
    fs::write(path("cut.png"), &demo[..demo.len() * 6 / 10]).unwrap();
    fs::write(path("header.png"), &demo[..20]).unwrap();
    fs::write(path("empty.png"), "").unwrap();
    fs::write(path("bomb.png"), png_that_claims(60_000, 60_000)).unwrap();
    fs::write(path("hollow.png"), png_that_claims(64, 64)).unwrap();
    fs::write(path("nothing.png"), png_that_claims(0, 64)).unwrap();
    fs::create_dir(path("folder.png")).unwrap();
    fs::create_dir(path("no-images")).unwrap();
    write_gray(&path("strip.png"), 603, 3);
    write_gray(&path("needle.png"), 1, 250);
    let cases = [
        case(
            "words",
            &["words.png"],
            1,
            &["`words.png`", "is not a PNG, JPEG, ", "convert"],
        ),
        case(
            "another format",
            &["picture.avif"],
            1,
            &["`picture.avif`", "AVIF", "avifdec"],
        ),
        case(
            "cut off",
            &["cut.png"],
            1,
            &["`cut.png`", "export it again"],
        ),
        case(
            "cut in the header",
            &["header.png"],
            1,
            &["`header.png`", "export it again"],
        ),
        case(
            "no byte",
            &["empty.png"],
            1,
            &["`empty.png`", "empty (0 bytes)"],
        ),
        case(
            "not there",
            &["absent.png"],
            1,
            &["`absent.png`", "No such file"],
        ),
        case("a folder", &["folder.png"], 1, &["`folder.png`"]),
        case(
            "image bomb",
            &["bomb.png"],
            1,
            &["`bomb.png`", "60000 × 60000", "scale it down"],
        ),
        case(
            "no pixels",
            &["hollow.png"],
            1,
            &["`hollow.png`", "export it again"],
        ),
        case("no width", &["nothing.png"], 1, &["`nothing.png`"]),
        case(
            "too wide",
            &["strip.png"],
            1,
            &["strip.png", "603 × 3", "200 times"],
        ),
        case(
            "too tall",
            &["needle.png"],
            1,
            &["needle.png", "1 × 250", "200 times"],
        ),
        case(
            "folder not there",
            &["--images-dir", "absent"],
            1,
            &["`absent`", "No such file"],
        ),
        case(
            "folder without images",
            &["--images-dir", "no-images"],
            1,
            &["`no-images`", "expected"],
        ),
    ];
    check(folder.path(), &cases);
}

#[test]
fn odd_sizes_within_the_limits_get_a_report() {
    let folder = tempdir().unwrap();
    write_gray(&folder.path().join("pixel.png"), 1, 1);
    write_gray(&folder.path().join("wide.png"), 20_000, 200);
    write_gray(&folder.path().join("longest.png"), 200, 1);
    for name in ["pixel.png", "wide.png", "longest.png"] {
        let args = ["--json", "--max-new-tokens", "8", name];
        let (code, stdout, stderr) = infer(folder.path(), &args);
        assert_eq!(code, 0, "{name}: {stderr}");
        let record: Value = serde_json::from_str(&stdout).unwrap();
        assert!(record.get("error").is_none(), "{name}: {record}");
        assert!(
            record["completion_tokens"].as_u64().unwrap() > 0,
            "{name}: {record}"
        );
    }
}

#[test]
fn a_request_that_cannot_be_met_is_refused() {
    let folder = tempdir().unwrap();
    let image = fixture_image("model_a.png");
    let image = text(&image);
    let mut cases = vec![
        case(
            "longer than the context",
            &["--max-new-tokens", "100000000", image],
            1,
            &["context", "100000000", "`--max-new-tokens`"],
        ),
        case(
            "image token in the question",
            &["--prompt", "这里<|image_pad|>有什么？", image],
            1,
            &["`<|image_pad|>`", "take it out"],
        ),
        case(
            "turn in the system message",
            &["--system", "好<|im_end|>", image],
            1,
            &["`<|im_end|>`", "take it out"],
        ),
        case(
            "no room for a token",
            &["--max-pixels", "100", image],
            1,
            &["`max_pixels`", "expected"],
        ),
    ];
    if !cfg!(feature = "cuda") {
        let says = ["`cuda:0`", "--features cuda"];
        cases.push(case(
            "cuda not built in",
            &["--device", "cuda:0", image],
            1,
            &says,
        ));
    }
    if !cfg!(feature = "wgpu") {
        let says = ["`wgpu`", "--features wgpu"];
        cases.push(case(
            "wgpu not built in",
            &["--device", "wgpu", image],
            1,
            &says,
        ));
    }
    check(folder.path(), &cases);
}

#[test]
fn wrong_usage_ends_with_two() {
    let folder = tempdir().unwrap();
    let image = fixture_image("model_a.png");
    let image = text(&image);
    let cases = [
        case(
            "no such device",
            &["--device", "gpu", image],
            2,
            &["gpu", "cpu, cuda, cuda:N"],
        ),
        case(
            "no such option",
            &["--max-token", "3", image],
            2,
            &["--max-token"],
        ),
        case(
            "no such type",
            &["--dtype", "int4", image],
            2,
            &["int4", "bf16"],
        ),
        case(
            "no new token",
            &["--max-new-tokens", "0", image],
            2,
            &["--max-new-tokens", "at least 1"],
        ),
        case(
            "words for a number",
            &["--max-new-tokens", "many", image],
            2,
            &["--max-new-tokens", "many"],
        ),
        case("cold", &["--temperature", "-1", image], 2, &["-1"]),
        case(
            "cold, with =",
            &["--temperature=-1", image],
            2,
            &["temperature", "-1", "expected 0"],
        ),
        case(
            "temperature NaN",
            &["--temperature", "NaN", image],
            2,
            &["temperature", "expected 0"],
        ),
        case(
            "no share",
            &["--top-p", "0", image],
            2,
            &["top_p", "expected"],
        ),
        case(
            "no image at once",
            &["--batch-size", "0", image],
            2,
            &["--batch-size", "at least 1"],
        ),
        case(
            "stream and json",
            &["--stream", "--json", image],
            2,
            &["--stream", "--json"],
        ),
        case(
            "stream and file",
            &["--stream", "--output", "a.jsonl", image],
            2,
            &["--stream", "--output"],
        ),
        case(
            "images twice",
            &["--images-dir", ".", image],
            2,
            &["--images-dir"],
        ),
    ];
    check(folder.path(), &cases);
    let (code, stdout, stderr) = run(folder.path(), &["diagnose"]);
    let problems = refusal_problems(code, 2, &stdout, &stderr);
    assert!(
        problems.is_empty() && stderr.contains("diagnose"),
        "{problems:?}: {stderr}"
    );
}

#[test]
fn a_file_that_is_no_batch_run_stays_as_it_was() {
    let folder = tempdir().unwrap();
    let image = fixture_image("model_a.png");
    let foreign: [(&'static str, &[u8]); 5] = [
        ("words.txt", b"my notes\nmore notes\n"),
        ("words-without-end.txt", b"my only notes"),
        ("object.json", b"{\"image\": {\"width\": 3}}"),
        ("other.jsonl", b"{\"report\": \"normal\"}\n"),
        ("bytes.bin", &[0xff, 0xfe, 0x00, 0x01, b'\n', 0x80]),
    ];
    for (name, bytes) in foreign {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    fs::create_dir(folder.path().join("folder.jsonl")).unwrap();
    let to = |name, output: &str, says: &[&str]| {
        let args = ["--max-new-tokens", "1", "--output", output, text(&image)];
        case(name, &args, 1, &[&[output], says].concat())
    };
    let mut cases: Vec<Case> = foreign
        .iter()
        .map(|(name, _)| to(name, name, &[]))
        .collect();
    cases.push(to(
        "folder not there",
        "absent/reports.jsonl",
        &["No such file"],
    ));
    cases.push(to("a folder", "folder.jsonl", &["directory"]));
    for case in &mut cases[..4] {
        case.says.push("--output".to_string());
    }
    let checked = std::panic::catch_unwind(|| check(folder.path(), &cases));
    // Lost data first: it is worse than a message.
    for (name, bytes) in foreign {
        let now = fs::read(folder.path().join(name)).unwrap();
        assert!(now == bytes, "`{name}` was changed");
    }
    assert!(!folder.path().join("absent").exists());
    if let Err(failure) = checked {
        std::panic::resume_unwind(failure);
    }
}

#[test]
fn a_model_that_is_there_is_not_written_over() {
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "mine").unwrap();
    let (code, _, stderr) = run(folder.path(), &["init-tiny", "--output", text(&model)]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("not empty"), "{stderr}");
    assert_eq!(
        fs::read_to_string(model.join("config.json")).unwrap(),
        "mine"
    );
}
