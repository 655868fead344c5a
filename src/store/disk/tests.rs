//! A store on disk: what it keeps, refuses and finds out.

use tempfile::TempDir;

use super::*;
use crate::store::{Film, Report, record::Patient};

fn arrival(uid: &str, bytes: &[u8]) -> Arrival {
    Arrival {
        study: Study {
            study_uid: uid.into(),
            patient: Patient {
                id: "P-1".into(),
                name: "张三".into(),
                ..Patient::default()
            },
            date: "20260101".into(),
            ..Study::default()
        },
        film: Film {
            view: "PA".into(),
            ..Film::default()
        },
        bytes: bytes.to_vec(),
    }
}

fn signer() -> Actor {
    Actor {
        name: "李医生".into(),
        role: "signer",
    }
}

fn open(folder: &TempDir, key: Option<&StoreKey>) -> DiskStore {
    DiskStore::open(folder.path(), key, Open::Serve).unwrap()
}

fn key() -> StoreKey {
    StoreKey::read(&"5a".repeat(32)).unwrap()
}

/// All bytes below a folder.
fn all_bytes(folder: &Path) -> Vec<u8> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(all_bytes(&path)),
            false => all.extend(std::fs::read(&path).unwrap()),
        }
    }
    all
}

fn has(bytes: &[u8], piece: &str) -> bool {
    bytes
        .windows(piece.len())
        .any(|part| part == piece.as_bytes())
}

#[test]
fn what_was_kept_is_there_after_a_restart_with_its_audit_log() {
    for key in [None, Some(key())] {
        let folder = tempfile::tempdir().unwrap();
        let key = key.as_ref();
        let id = {
            let store = open(&folder, key);
            let one = store
                .receive(arrival("1.2", b"film one"), &Actor::server())
                .unwrap();
            let two = store
                .receive(arrival("1.2", b"film two"), &Actor::server())
                .unwrap();
            assert_eq!((&one.study, one.again), (&two.study, false));
            let again = store
                .receive(arrival("1.2", b"film two"), &Actor::server())
                .unwrap();
            assert_eq!((again.film, again.again), (two.film.clone(), true));
            store
                .change(&one.study, "sign", &signer(), &mut |study| {
                    study.signed.push(Report {
                        text: "双肺纹理清晰。".into(),
                        by: "李医生".into(),
                        at: 1,
                    });
                    study.state = StudyState::Signed;
                    Ok(())
                })
                .unwrap();
            assert_eq!(store.film(&one.study, &two.film).unwrap(), b"film two");
            one.study
        };
        // Nothing of a patient is readable in an encrypted store.
        let bytes = all_bytes(folder.path());
        assert_eq!(has(&bytes, "张三"), key.is_none());
        assert_eq!(has(&bytes, "双肺纹理清晰"), key.is_none());
        assert_eq!(has(&bytes, "film one"), key.is_none());

        let store = open(&folder, key);
        let study = store.study(&id).unwrap();
        assert_eq!(
            (study.films.len(), study.state, study.revision),
            (2, StudyState::Signed, 3)
        );
        assert_eq!(store.by_uid("1.2").unwrap(), Some(id.clone()));
        let audit = store.audit().unwrap();
        let actions: Vec<&str> = audit.iter().map(|line| line.action.as_str()).collect();
        assert_eq!(actions, ["receive", "receive", "sign"]);
        assert_eq!(audit[2].actor, "李医生");
        let verified = store.verify(None).unwrap();
        assert!(verified.faults.is_empty(), "{:?}", verified.faults);
        assert_eq!(
            (verified.studies, verified.films, verified.lines),
            (1, 2, 3)
        );

        // A signed study takes no film, and a change that fails changes nothing.
        assert!(matches!(
            store.receive(arrival("1.2", b"late"), &Actor::server()),
            Err(StoreError::Refused(_))
        ));
        let refused = store.change(&id, "edit", &signer(), &mut |study| {
            study.signed.clear();
            Err(StoreError::Refused("no".into()))
        });
        assert!(refused.is_err());
        assert_eq!(store.study(&id).unwrap(), study);
        assert_eq!(store.verify(None).unwrap().lines, 3);
    }
}

#[test]
fn each_kind_of_tampering_is_found() {
    type Tamper = (&'static str, &'static str);
    let cases: [Tamper; 6] = [
        ("UPDATE audit SET actor = 'x' WHERE number = 1", "line 1"),
        ("DELETE FROM audit WHERE number = 2", "no line 2"),
        ("UPDATE audit SET at = at - 1 WHERE number = 3", "line 3"),
        (
            "UPDATE studies SET record = replace(CAST(record AS TEXT), 'P-1', 'P-2')",
            "last line",
        ),
        ("DELETE FROM studies", "is gone"),
        ("DELETE FROM audit WHERE number = 3", "noted"),
    ];
    for (sql, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder, None);
        for bytes in [b"a", b"b"] {
            store
                .receive(arrival("1.2", bytes), &Actor::server())
                .unwrap();
        }
        store.note("look", None, &signer()).unwrap();
        let head = store.verify(None).unwrap();
        assert!(head.faults.is_empty());
        let sql = sql.replace(
            "replace(CAST(record AS TEXT), 'P-1', 'P-2')",
            "CAST(replace(CAST(record AS TEXT), 'P-1', 'P-2') AS BLOB)",
        );
        store.lock().connection.execute_batch(&sql).unwrap();
        let faults = store.verify(Some((head.lines, &head.head))).unwrap().faults;
        assert!(
            faults.iter().any(|fault| fault.contains(expected)),
            "{sql}: {faults:?}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, None);
    let film = store
        .receive(arrival("1.2", b"a"), &Actor::server())
        .unwrap()
        .film;
    std::fs::write(store.films.path(&film), b"b").unwrap();
    assert!(store.verify(None).unwrap().faults[0].contains("was changed"));
    std::fs::remove_file(store.films.path(&film)).unwrap();
    assert_eq!(store.verify(None).unwrap().faults.len(), 1);
}

#[test]
fn keys_accounts_and_a_second_server() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |key: Option<&StoreKey>, how| {
        DiskStore::open(folder.path(), key, how)
            .err()
            .map(|error| error.to_string())
    };
    assert!(refusal(None, Open::Existing).unwrap().contains("no store"));
    let store = open(&folder, Some(&key()));
    assert!(
        refusal(Some(&key()), Open::Serve)
            .unwrap()
            .contains("another server")
    );
    assert!(refusal(None, Open::Beside).unwrap().contains("encrypted"));
    let other = StoreKey::read(&"11".repeat(32)).unwrap();
    assert!(
        refusal(Some(&other), Open::Beside)
            .unwrap()
            .contains("not the one")
    );

    let account = Account {
        name: "李医生".into(),
        role: Role::Signer,
        scopes: Role::Signer.scopes().to_vec(),
        has_key: true,
        created_at: now(),
        expires_at: Some(now() + 1000),
    };
    let beside = DiskStore::open(folder.path(), Some(&key()), Open::Existing).unwrap();
    let shown = beside
        .add_account(&account, &Actor::server())
        .unwrap()
        .unwrap();
    assert!(beside.add_account(&account, &Actor::server()).is_err());
    // The server sees it at once, and only its hash is kept.
    assert_eq!(
        store.account_of_key(&shown).unwrap().as_ref(),
        Some(&account)
    );
    assert!(!has(&all_bytes(folder.path()), &shown));
    assert_eq!(store.account_of_name("李医生").unwrap(), None);
    assert!(account.scopes.contains(&Scope::Sign) && !account.scopes.contains(&Scope::Admin));
    assert!(account.is_valid(now()) && !account.is_valid(now() + 2000));
    beside.remove_account("李医生", &Actor::server()).unwrap();
    assert_eq!(store.account_of_key(&shown).unwrap(), None);
    assert!(store.verify(None).unwrap().faults.is_empty());
}

#[test]
fn a_film_without_its_record_is_removed_and_lists_follow_other_processes() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, None);
    let kept = store
        .receive(arrival("1.2", b"a"), &Actor::server())
        .unwrap();
    // As after `kill -9` between file and record.
    store.films.write("00ff", b"left").unwrap();
    drop(store);
    let store = open(&folder, None);
    assert!(store.films.read("00ff").is_err());
    assert!(store.film(&kept.study, &kept.film).is_ok());

    let beside = DiskStore::open(folder.path(), None, Open::Existing).unwrap();
    let query = Query {
        limit: 10,
        ..Query::default()
    };
    assert_eq!(store.list(&query).unwrap().total, 1);
    beside
        .receive(arrival("1.3", b"b"), &Actor::server())
        .unwrap();
    assert_eq!(store.list(&query).unwrap().total, 2);
    assert_eq!(
        beside
            .delete_older(0, &[StudyState::Signed], &Actor::server())
            .unwrap(),
        0
    );
    assert_eq!(beside.delete_older(0, &[], &Actor::server()).unwrap(), 2);
    assert_eq!(store.list(&query).unwrap().total, 0);
    assert!(store.films.names().unwrap().is_empty());
}

#[test]
fn a_backup_is_a_store_and_the_next_one_follows_it() {
    let folder = tempfile::tempdir().unwrap();
    let target = tempfile::tempdir().unwrap();
    let store = open(&folder, Some(&key()));
    let one = store
        .receive(arrival("1.2", b"a"), &Actor::server())
        .unwrap();
    assert_eq!(store.backup(target.path()).unwrap(), 1);
    store
        .receive(arrival("1.3", b"b"), &Actor::server())
        .unwrap();
    store.delete(&one.study, &signer()).unwrap();
    assert_eq!(store.backup(target.path()).unwrap(), 1);
    let copy = DiskStore::open(target.path(), Some(&key()), Open::Serve).unwrap();
    assert!(copy.study(&one.study).is_err() && copy.by_uid("1.3").unwrap().is_some());
    let verified = copy.verify(None).unwrap();
    assert!(verified.faults.is_empty(), "{:?}", verified.faults);
    assert_eq!((verified.studies, verified.films), (1, 1));
}

#[test]
fn a_newer_store_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(&folder, None));
    let file = Connection::open(folder.path().join("store.db")).unwrap();
    file.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(file);
    let error = DiskStore::open(folder.path(), None, Open::Beside)
        .err()
        .unwrap();
    assert!(error.to_string().contains("version 99"));
}
