//! Who asks, and what they may do: a key of the command line, an account's key, or a name in a trusted proxy's header.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Json,
    extract::{Extension, Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::Next,
    response::Response,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::serve::{
    App,
    auth::{KeyCheck, Peer},
    error::ApiError,
};
use crate::store::{
    Actor,
    disk::{Account, DiskStore, Scope},
    now,
};

/// The address at the other end of the connection itself, whatever headers say.
#[derive(Debug, Clone, Copy)]
pub(in crate::serve) struct ConnectedFrom(pub(in crate::serve) IpAddr);

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::serve) struct Identity {
    /// Name of an account; none for a key of the command line, and on a server without accounts.
    pub(super) name: Option<String>,
    role: &'static str,
    scopes: Vec<Scope>,
}

impl Identity {
    /// Whoever reaches a server without accounts.
    fn anybody() -> Self {
        Self {
            name: None,
            role: "anybody",
            scopes: Scope::ALL.to_vec(),
        }
    }

    /// A program with a key of the command line, on a server with accounts.
    fn program() -> Self {
        Self {
            name: None,
            role: "api",
            scopes: vec![Scope::Ask, Scope::Upload],
        }
    }

    fn account(account: Account) -> Self {
        Self {
            name: Some(account.name),
            role: account.role.name(),
            scopes: account.scopes,
        }
    }

    /// As the audit log names them; `as_name` is what somebody without an account signs as.
    pub(super) fn actor(&self, as_name: Option<&str>) -> Actor {
        let name = self.name.as_deref().or(as_name);
        Actor {
            name: name.unwrap_or(self.role).to_owned(),
            role: self.role,
        }
    }

    /// Refuses what they may not do.
    ///
    /// # Errors
    /// [`ApiError`] of status 403 that names role and scope.
    pub(in crate::serve) fn require(&self, scope: Scope) -> Result<(), ApiError> {
        if self.scopes.contains(&scope) {
            return Ok(());
        }
        Err(ApiError::new(
            StatusCode::FORBIDDEN,
            format!(
                "a key of the role `{}` with the scopes `{}` may not do this; it needs the scope `{}`",
                self.role,
                self.scopes.iter().map(|one| one.name()).collect::<Vec<_>>().join(" "),
                scope.name()
            ),
        )
        .with_code("scope_missing"))
    }
}

/// The scope that a path of the API needs; `None` where any account may, or the handler decides.
fn needed(method: &Method, path: &str) -> Option<Scope> {
    let path = path
        .strip_prefix("/v1")
        .unwrap_or(path)
        .trim_end_matches('/');
    match path {
        "/metrics" | "/load_lora_adapter" | "/unload_lora_adapter" => Some(Scope::Admin),
        "/account" | "/limits" => None,
        _ if path.starts_with("/models") => None,
        _ if path.starts_with("/studies") || path.starts_with("/worklist") => None,
        _ if *method == Method::GET => None,
        _ => Some(Scope::Ask),
    }
}

fn shown_key(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// What a request shows of who sends it: a key, or a name in a trusted proxy's header.
struct Shown {
    key: Option<String>,
    name: Option<String>,
}

impl Shown {
    fn of(app: &App, request: &Request) -> Self {
        let header = app
            .studies
            .as_ref()
            .and_then(|studies| studies.user_header.as_ref());
        let from = request.extensions().get::<ConnectedFrom>();
        // Anybody can write a header: only that of a proxy counts.
        let header = header.filter(|_| from.is_some_and(|from| app.config.is_proxy(from.0)));
        let name = header.and_then(|header| request.headers().get(header));
        Self {
            key: shown_key(request.headers()).map(str::to_owned),
            name: name.map(|name| String::from_utf8_lossy(name.as_bytes()).trim().to_owned()),
        }
    }

    /// The account, if it has not ended.
    async fn account(self, store: Arc<DiskStore>) -> Result<Option<Account>, ApiError> {
        let found = tokio::task::spawn_blocking(move || match (self.key, self.name) {
            (Some(key), _) => store.account_of_key(&key),
            (None, Some(name)) => store.account_of_name(&name),
            (None, None) => Ok(None),
        });
        let found = found.await.map_err(|_| ApiError::internal())??;
        Ok(found.filter(|account| account.is_valid(now())))
    }
}

/// Around every guarded request: finds out who asks, and refuses what they may not.
pub(in crate::serve) async fn identify(
    State((app, keys)): State<(Arc<App>, KeyCheck)>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let accounts = app
        .studies
        .as_ref()
        .and_then(|studies| studies.accounts.clone());
    let identity = match accounts {
        None => {
            keys.check(request.headers())?;
            Identity::anybody()
        }
        Some(_) if keys.has_any() && keys.check(request.headers()).is_ok() => Identity::program(),
        Some(store) => {
            let account = Shown::of(&app, &request).account(store).await?;
            Identity::account(account.ok_or_else(KeyCheck::refused)?)
        }
    };
    if let Some(scope) = needed(request.method(), request.uri().path()) {
        identity.require(scope)?;
    }
    // Where there are several keys or accounts, each is somebody; a single key is everybody's.
    let who = match (&identity.name, request.headers().get(header::AUTHORIZATION)) {
        (Some(name), _) => Some(name.as_bytes().to_vec()),
        (None, Some(key)) if keys.has_several() => Some(key.as_bytes().to_vec()),
        _ => None,
    };
    if let Some(who) = who {
        let digest = Sha256::digest(&who);
        let mut client = [0; 8];
        client.copy_from_slice(&digest[..8]);
        let client = u64::from_le_bytes(client);
        request.extensions_mut().insert(Peer { client });
    }
    request.extensions_mut().insert(identity);
    Ok(next.run(request).await)
}

/// `GET /v1/account`: name, role and scopes of who asks.
pub(super) async fn account(Extension(identity): Extension<Identity>) -> Json<Value> {
    Json(json!({
        "object": "account",
        "name": identity.name,
        "role": identity.role,
        "scopes": identity.scopes,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_needs_its_scope() {
        let of = |method: Method, path: &str| needed(&method, path);
        assert_eq!(of(Method::POST, "/v1/chat/completions"), Some(Scope::Ask));
        assert_eq!(of(Method::POST, "/tokenize/"), Some(Scope::Ask));
        assert_eq!(of(Method::POST, "/v1/images/preview"), Some(Scope::Ask));
        assert_eq!(
            of(Method::POST, "/v1/load_lora_adapter/"),
            Some(Scope::Admin)
        );
        assert_eq!(of(Method::GET, "/metrics"), Some(Scope::Admin));
        assert_eq!(of(Method::GET, "/v1/models/tiny"), None);
        assert_eq!(of(Method::POST, "/v1/studies/ab/sign"), None);
    }

    #[test]
    fn a_refusal_names_role_and_scope() {
        let program = Identity::program();
        assert!(program.require(Scope::Ask).is_ok());
        let error = program.require(Scope::Read).unwrap_err();
        assert_eq!(error.status, StatusCode::FORBIDDEN);
        assert!(error.message.contains("`api`") && error.message.contains("`read`"));
    }
}
