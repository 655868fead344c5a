//! `serve` for clients as they are: paths, ids of requests, pages of other origins.

use serde_json::json;

use crate::{
    run,
    server::{Response, start},
};

fn allowed(response: &Response) -> [Option<&str>; 2] {
    [
        response.header("access-control-allow-origin"),
        response.header("access-control-allow-credentials"),
    ]
}

#[test]
fn paths_are_taken_with_a_slash_and_without_the_version() {
    let server = start(&[]);
    for path in ["/v1/models", "/v1/models/", "/models", "/models/"] {
        let models = server.get(path).json();
        assert_eq!(models["data"][0]["id"], "tiny", "{path}");
        assert!(models["data"][0]["max_model_len"].as_u64().unwrap() >= 512);
    }
    for path in ["/v1/models/tiny", "/v1/models/tiny/", "/models/tiny"] {
        assert_eq!(server.get(path).json()["id"], "tiny", "{path}");
    }
    let body = json!({"messages": [{"role": "user", "content": "?"}], "max_tokens": 2});
    for path in ["/v1/chat/completions/", "/chat/completions"] {
        assert_eq!(server.post(path, &body).status, 200, "{path}");
    }
    for path in [
        "/health", "/health/", "/healthz", "/readyz", "/ping", "/version",
    ] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert_eq!(server.send("POST", "/ping", &[], b"").status, 200);
    let version = server.get("/version").json();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let nothing = server.get("/v1/embeddings");
    assert_eq!(nothing.status, 404);
    for listed in [
        "POST /v1/chat/completions",
        "POST /v1/responses",
        "GET /v1/models",
    ] {
        assert!(nothing.body.contains(listed), "{nothing:?}");
    }
    assert_eq!(server.get("/v1/chat/completions").status, 405);
}

#[test]
fn the_id_of_a_request_is_its_own_where_it_can_be() {
    let server = start(&[]);
    let id_of = |head: &[&str], path: &str| {
        let response = server.send("GET", path, head, b"");
        response.header("x-request-id").unwrap().to_owned()
    };
    assert_eq!(id_of(&["x-request-id: abc-1"], "/v1/models"), "abc-1");
    assert_eq!(id_of(&["x-request-id: abc-1"], "/nowhere"), "abc-1");
    assert_eq!(id_of(&["x-request-id: a b"], "/v1/models").len(), 32);
    assert_ne!(id_of(&[], "/healthz"), id_of(&[], "/healthz"));
    let body = json!({"messages": [{"role": "user", "content": "?"}], "max_tokens": 2});
    let head = ["content-type: application/json", "x-request-id: mine"];
    let body = body.to_string();
    let answer = server.send("POST", "/v1/chat/completions", &head, body.as_bytes());
    assert_eq!(answer.json()["id"], "chatcmpl-mine");
    assert!(server.logs("request id=mine "), "{}", server.log());
}

#[test]
fn pages_of_other_origins_are_let_in_by_name() {
    let viewer = "origin: https://viewer.example";
    let ask = [
        viewer,
        "access-control-request-method: POST",
        "access-control-request-headers: authorization,content-type,x-stainless-os",
    ];
    // Without the option, as ever.
    let server = start(&[]);
    assert_eq!(server.send("OPTIONS", "/v1/models", &ask, b"").status, 403);
    let refused = server.send("GET", "/v1/models", &[viewer], b"");
    assert_eq!((refused.status, allowed(&refused)), (403, [None, None]));
    drop(server);

    let key = ["--api-key", "correct-horse"];
    let server = start(
        &[
            &key[..],
            &["--allow-origin", "https://viewer.example", "null"],
        ]
        .concat(),
    );
    let preflight = server.send("OPTIONS", "/v1/chat/completions", &ask, b"");
    assert_eq!(preflight.status, 204);
    assert_eq!(
        allowed(&preflight),
        [Some("https://viewer.example"), Some("true")]
    );
    let headers = preflight.header("access-control-allow-headers").unwrap();
    assert!(headers.contains("x-stainless-os"), "{headers}");
    assert_eq!(
        preflight.header("access-control-allow-methods"),
        Some("GET, POST, OPTIONS")
    );
    // A page has to see why it was refused.
    let no_key = server.send("GET", "/v1/models", &[viewer], b"");
    assert_eq!(no_key.status, 401);
    assert_eq!(
        allowed(&no_key),
        [Some("https://viewer.example"), Some("true")]
    );
    assert_eq!(no_key.header("vary"), Some("Origin"));
    let exposed = no_key.header("access-control-expose-headers").unwrap();
    assert!(exposed.contains("x-request-id"), "{exposed}");
    let bearer = "authorization: Bearer correct-horse";
    assert_eq!(
        server
            .send("GET", "/v1/models", &[viewer, bearer], b"")
            .status,
        200
    );
    let from_file = server.send("GET", "/v1/models", &["origin: null", bearer], b"");
    assert_eq!(
        (from_file.status, allowed(&from_file)[0]),
        (200, Some("null"))
    );
    for other in [
        "origin: https://evil.example",
        "origin: http://viewer.example",
    ] {
        let refused = server.send("GET", "/v1/models", &[other, bearer], b"");
        assert_eq!(
            (refused.status, allowed(&refused)),
            (403, [None, None]),
            "{other}"
        );
    }
    // No question of a browser.
    assert_eq!(
        server.send("OPTIONS", "/v1/models", &[bearer], b"").status,
        405
    );
    drop(server);

    let server = start(&["--allow-origin", "*"]);
    let any = server.send("GET", "/v1/models", &["origin: https://a.example"], b"");
    assert_eq!((any.status, allowed(&any)), (200, [Some("*"), None]));
    assert!(server.logs("every web page"), "{}", server.log());
    // The server still has to be called by its own name.
    let renamed = ["origin: https://a.example", "host: evil.example"];
    assert_eq!(server.send("GET", "/v1/models", &renamed, b"").status, 403);
    drop(server);

    let folder = tempfile::tempdir().unwrap();
    let args = ["serve", "--allow-origin", "viewer.example"];
    let (code, _, stderr) = run(folder.path(), &args);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("`viewer.example` is no origin"), "{stderr}");
}
