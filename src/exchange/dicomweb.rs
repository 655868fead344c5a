//! DICOMweb as a client: QIDO-RS for what is new, WADO-RS for films, STOW-RS for reports.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

/// A DICOMweb service.
pub(super) struct Service {
    agent: Agent,
    base: String,
    /// `Authorization`, if the address had a user and password, or a token was given.
    authorization: Option<String>,
}

/// Time for a whole answer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Largest list of studies or instances, in bytes.
const MAX_LIST: u64 = 16 << 20;

impl Service {
    pub(super) fn new(base: &str, authorization: Option<String>) -> Self {
        let agent = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .max_redirects(0)
            .build()
            .into();
        Self {
            agent,
            base: base.trim_end_matches('/').to_owned(),
            authorization,
        }
    }

    fn get(&self, path: &str, accept: &str, most: u64) -> Result<(String, Vec<u8>), String> {
        let mut request = self
            .agent
            .get(format!("{}/{path}", self.base))
            .header("accept", accept);
        if let Some(value) = &self.authorization {
            request = request.header("authorization", value);
        }
        // The library's words may have the address.
        let mut answer = request.call().map_err(|error| reason(&error))?;
        match answer.status().as_u16() {
            200 => {}
            204 => return Ok((String::new(), Vec::new())),
            status => return Err(format!("it answers with status {status}")),
        }
        let kind = answer
            .headers()
            .get("content-type")
            .and_then(|value| value.to_str().ok());
        let kind = kind.unwrap_or_default().to_owned();
        let body = answer.body_mut().with_config().limit(most).read_to_vec();
        body.map(|body| (kind, body))
            .map_err(|error| reason(&error))
    }

    fn list(&self, path: &str) -> Result<Vec<Value>, String> {
        let (_, body) = self.get(path, "application/dicom+json", MAX_LIST)?;
        if body.is_empty() {
            return Ok(Vec::new());
        }
        match serde_json::from_slice(&body) {
            Ok(Value::Array(list)) => Ok(list),
            _ => Err("its answer is no list of DICOM JSON".into()),
        }
    }

    /// Instances of studies of a day of study: study, series and instance UIDs.
    pub(super) fn instances(&self, since: &str, most: usize) -> Result<Vec<[String; 3]>, String> {
        let mut found = Vec::new();
        for modality in ["CR", "DX"] {
            let studies = self.list(&format!(
                "studies?StudyDate={since}-&ModalitiesInStudy={modality}&limit={most}"
            ))?;
            for study in studies.iter().take(most) {
                let Some(study) = uid(study, "0020000D") else {
                    continue;
                };
                for instance in self.list(&format!("studies/{study}/instances"))? {
                    let is_film = instance["00080060"]["Value"][0]
                        .as_str()
                        .is_none_or(|one| one == "CR" || one == "DX");
                    let (series, instance) =
                        (uid(&instance, "0020000E"), uid(&instance, "00080018"));
                    if let (Some(series), Some(instance), true) = (series, instance, is_film) {
                        found.push([study.clone(), series, instance]);
                    }
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// The file of an instance.
    pub(super) fn instance(
        &self,
        [study, series, instance]: &[String; 3],
        most: u64,
    ) -> Result<Vec<u8>, String> {
        let path = format!("studies/{study}/series/{series}/instances/{instance}");
        let accept = "multipart/related; type=\"application/dicom\"; transfer-syntax=*";
        let (kind, body) = self.get(&path, accept, most)?;
        let boundary = boundary(&kind).ok_or("its answer has no parts")?;
        first_part(&body, &boundary)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| "its answer has no whole part".into())
    }

    /// Sends a file by STOW-RS.
    pub(super) fn store(&self, file: &[u8]) -> Result<(), String> {
        let boundary = format!("xray-{:032x}", rand::random::<u128>());
        let mut body =
            format!("--{boundary}\r\nContent-Type: application/dicom\r\n\r\n").into_bytes();
        body.extend(file);
        body.extend(format!("\r\n--{boundary}--\r\n").into_bytes());
        let kind = format!("multipart/related; type=\"application/dicom\"; boundary={boundary}");
        let mut request = self
            .agent
            .post(format!("{}/studies", self.base))
            .header("content-type", &kind)
            .header("accept", "application/dicom+json");
        if let Some(value) = &self.authorization {
            request = request.header("authorization", value);
        }
        let answer = request.send(&body[..]).map_err(|error| reason(&error))?;
        match answer.status().as_u16() {
            // 202: kept with a warning. 409 may mean that some of many were refused; here it is the one.
            200 | 202 => Ok(()),
            status => Err(format!("it answers with status {status}")),
        }
    }
}

/// What went wrong, without addresses.
fn reason(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(_) => "no answer in time".into(),
        ureq::Error::BodyExceedsLimit(_) => "its answer is too large".into(),
        ureq::Error::HostNotFound => "its host is not found".into(),
        ureq::Error::Io(error) => error.kind().to_string(),
        _ => "it cannot be reached, or does not speak HTTP".into(),
    }
}

fn uid(value: &Value, tag: &str) -> Option<String> {
    let text = value[tag]["Value"][0].as_str()?;
    let known = |c: u8| c.is_ascii_digit() || c == b'.';
    (!text.is_empty() && text.len() <= 64 && text.bytes().all(known)).then(|| text.to_owned())
}

fn boundary(kind: &str) -> Option<String> {
    let (media, parameters) = kind.split_once(';')?;
    if !media.trim().eq_ignore_ascii_case("multipart/related") {
        return None;
    }
    let value = parameters.split(';').find_map(|one| {
        let (key, value) = one.split_once('=')?;
        key.trim()
            .eq_ignore_ascii_case("boundary")
            .then(|| value.trim().trim_matches('"').to_owned())
    });
    value.filter(|value| (1..=70).contains(&value.len()))
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

/// The first part of a multipart body.
fn first_part<'a>(body: &'a [u8], boundary: &str) -> Option<&'a [u8]> {
    let mark = format!("--{boundary}");
    let begin = find(body, mark.as_bytes())? + mark.len();
    let rest = body.get(begin..)?;
    let head = find(rest, b"\r\n\r\n")? + 4;
    let content = &rest[head..];
    // A file may hold the mark by chance only with the line end before it.
    let end = find(content, format!("\r\n{mark}").as_bytes())?;
    Some(&content[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_part_is_taken_byte_by_byte() {
        let kind = "multipart/related; type=\"application/dicom\"; boundary=\"a b\"";
        assert_eq!(boundary(kind).as_deref(), Some("a b"));
        assert_eq!(boundary("application/json"), None);
        let body = b"--x\r\nContent-Type: application/dicom\r\n\r\n\0\r\n--y\r\n\xff\r\n--x--\r\n";
        assert_eq!(first_part(body, "x"), Some(&b"\0\r\n--y\r\n\xff"[..]));
        for cut in 0..body.len() - 8 {
            assert!(first_part(&body[..cut], "x").is_none());
        }
    }

    #[test]
    fn what_is_no_identifier_gets_into_no_address() {
        let bad = serde_json::json!({"0020000D": {"Value": ["1.2/../../x"]}});
        assert_eq!(uid(&bad, "0020000D"), None);
    }
}
