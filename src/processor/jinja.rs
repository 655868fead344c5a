//! A Jinja environment that renders chat templates as transformers does.
//!
//! Source: `_compile_jinja_template`, transformers, `utils/chat_template_utils.py`.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use chrono::DateTime;
use chrono::format::{Fixed, Item, Numeric, StrftimeItems};
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// The environment: block trimming, Python's string methods, `raise_exception`, `strftime_now`
/// (in UTC) and a `tojson` that writes as Python's `json.dumps(…, ensure_ascii=False)`.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// JSON with Python's default separators, `", "` and `": "`.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// A value as Python's `json.dumps(…, ensure_ascii=False)` writes it.
pub(super) fn python_json(value: &serde_json::Value) -> String {
    let mut out = Vec::new();
    match value.serialize(&mut Serializer::with_formatter(&mut out, PythonFormatter)) {
        Ok(()) => String::from_utf8_lossy(&out).into_owned(),
        Err(_) => value.to_string(),
    }
}

fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, PythonFormatter)),
    };
    let failed = |reason: String| Error::new(ErrorKind::InvalidOperation, reason);
    written.map_err(|error| failed(format!("cannot write the value as JSON: {error}")))?;
    let text = String::from_utf8(out).map_err(|error| failed(error.to_string()))?;
    if ensure_ascii != Some(true) {
        return Ok(Value::from(text));
    }
    let mut ascii = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_ascii() {
            ascii.push(letter);
        } else {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    Ok(Value::from(ascii))
}

fn strftime_now(format: String) -> Result<String, Error> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    strftime(&format, now.as_secs())
}

/// Writes a moment, in seconds since 1970 UTC, by the directives of `strftime`.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let wrong = |reason: String| Error::new(ErrorKind::InvalidOperation, reason);
    let moment = i64::try_from(seconds)
        .ok()
        .and_then(|seconds| DateTime::from_timestamp(seconds, 0))
        .ok_or_else(|| wrong(format!("`strftime_now` cannot write second {seconds}")))?;
    // Formatting an unknown directive would panic. Parts of a second and the time zone are refused:
    // Python writes microseconds and, for `datetime.now()`, no zone.
    let items = StrftimeItems::new(format)
        .parse()
        .ok()
        .filter(|items| !items.iter().any(differs_from_python))
        .ok_or_else(|| wrong(format!("`strftime_now` does not know all of `{format}`")))?;
    Ok(moment.format_with_items(items.iter()).to_string())
}

fn differs_from_python(item: &Item<'_>) -> bool {
    match item {
        Item::Numeric(Numeric::Nanosecond, _) => true,
        Item::Fixed(text) => !matches!(
            text,
            Fixed::ShortMonthName
                | Fixed::LongMonthName
                | Fixed::ShortWeekdayName
                | Fixed::LongWeekdayName
                | Fixed::LowerAmPm
                | Fixed::UpperAmPm
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    fn render(source: &str) -> Result<String, Error> {
        environment().render_str(source, context! { x => "胸<b>\"", list => vec![1, 2] })
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        assert_eq!(render("{{ x|tojson }}").unwrap(), r#""胸<b>\"""#);
        assert_eq!(render("{{ list|tojson }}").unwrap(), "[1, 2]");
        assert_eq!(render("{{ {'a': 1}|tojson }}").unwrap(), r#"{"a": 1}"#);
        assert_eq!(
            render("{{ x|tojson(ensure_ascii=true) }}").unwrap(),
            r#""\u80f8<b>\"""#
        );
        assert_eq!(
            render("{{ list|tojson(indent=1) }}").unwrap(),
            "[\n 1,\n 2\n]"
        );
    }

    #[test]
    fn blocks_are_trimmed_and_methods_are_pythons() {
        assert_eq!(
            render("a\n  {% if true %}\nb\n  {% endif %}\nc").unwrap(),
            "a\nb\nc"
        );
        assert_eq!(
            render("{{ '\n\nab|c\n'.strip('\n').split('|')[-1] }}").unwrap(),
            "c"
        );
    }

    #[test]
    fn text_between_blocks_is_kept_as_jinja_keeps_it() {
        // The form in which published templates write an image.
        let source = "{%- for id in [true, false] %}\n    {%- if id %}Picture {{ 1 }}: {% endif -%}\n    <|image_pad|>\n{%- endfor %}";
        assert_eq!(
            render(source).unwrap(),
            "Picture 1: <|image_pad|><|image_pad|>"
        );
    }

    #[test]
    fn a_raised_exception_carries_its_words() {
        let error = render("{{ raise_exception('no tools') }}").unwrap_err();
        assert!(error.to_string().contains("no tools"));
    }

    #[test]
    fn dates_are_written_by_directive() {
        let leap_day = 951_782_400 + 13 * 3600 + 5 * 60 + 9;
        let text = strftime("%Y-%m-%d %j %a %B %I:%M:%S %p %%", leap_day).unwrap();
        assert_eq!(text, "2000-02-29 060 Tue February 01:05:09 PM %");
        assert_eq!(strftime("%d %b %y", 1_798_675_200).unwrap(), "31 Dec 26");
        for unknown in ["%Q", "%", "%Y %!", "%f", "%H:%M %Z", "%z"] {
            let error = strftime(unknown, 0).unwrap_err();
            assert!(error.to_string().contains(unknown), "{error}");
        }
    }
}
