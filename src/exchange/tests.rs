//! Associations against the server on a socket: films in, and what is damaged.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use dicom_core::{DataElement, PrimitiveValue, VR, dicom_value};
use dicom_dictionary_std::tags;
use dicom_object::InMemDicomObject;
use dicom_ul::pdu::{
    AssociationRQ, PDataValue, PDataValueType, Pdu, PresentationContextProposed, UserVariableItem,
    write_pdu,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    dimse::{Command, ECHO, NO_DATA, STORE, element},
    intake::Intake,
    receive::{ReceiveOptions, Receiver, VERIFICATION},
    send::{Instance, data_set, store},
};
use crate::{
    processor::image::DecodeLimits,
    store::{MemoryStore, Query, StudyState, StudyStore},
};

const CR: &str = "1.2.840.10008.5.1.4.1.1.1";

/// The data set of a film of 2 × 2 pixels.
fn film(study: &str, instance: &str, body_part: &str) -> Vec<u8> {
    let mut object = InMemDicomObject::new_empty();
    for (tag, vr, text) in [
        (tags::SPECIFIC_CHARACTER_SET, VR::CS, "ISO_IR 192"),
        (tags::SOP_CLASS_UID, VR::UI, CR),
        (tags::SOP_INSTANCE_UID, VR::UI, instance),
        (tags::MODALITY, VR::CS, "DX"),
        (tags::PATIENT_NAME, VR::PN, "张^三"),
        (tags::PATIENT_ID, VR::LO, "P-1"),
        (tags::BODY_PART_EXAMINED, VR::CS, body_part),
        (tags::VIEW_POSITION, VR::CS, "PA"),
        (tags::STUDY_INSTANCE_UID, VR::UI, study),
        (tags::SERIES_INSTANCE_UID, VR::UI, "1.2.9"),
        (tags::PHOTOMETRIC_INTERPRETATION, VR::CS, "MONOCHROME2"),
    ] {
        object.put(DataElement::new(tag, vr, PrimitiveValue::from(text)));
    }
    for (tag, number) in [
        (tags::SAMPLES_PER_PIXEL, 1_u16),
        (tags::ROWS, 2),
        (tags::COLUMNS, 2),
        (tags::BITS_ALLOCATED, 8),
        (tags::BITS_STORED, 8),
        (tags::HIGH_BIT, 7),
        (tags::PIXEL_REPRESENTATION, 0),
    ] {
        object.put(DataElement::new(tag, VR::US, dicom_value!(U16, [number])));
    }
    let pixels = PrimitiveValue::from(vec![0_u8, 80, 160, 255]);
    object.put(DataElement::new(tags::PIXEL_DATA, VR::OB, pixels));
    let meta = dicom_object::FileMetaTableBuilder::new()
        .media_storage_sop_class_uid(CR)
        .media_storage_sop_instance_uid(instance)
        .transfer_syntax("1.2.840.10008.1.2.1");
    let mut file = Vec::new();
    object
        .with_meta(meta)
        .unwrap()
        .write_all(&mut file)
        .unwrap();
    data_set(&file).to_vec()
}

struct Bench {
    store: Arc<MemoryStore>,
    intake: Arc<Intake>,
    receiver: Receiver,
}

fn bench(allowed: &[&str], max_object_bytes: u64) -> Bench {
    let store = Arc::new(MemoryStore::default());
    let intake = Arc::new(Intake::new(store.clone(), DecodeLimits::default()));
    let options = ReceiveOptions {
        title: "XRAY".into(),
        allowed: allowed.iter().map(|name| (*name).to_owned()).collect(),
        max_associations: 4,
        timeout: Duration::from_secs(2),
        max_object_bytes,
        max_memory_bytes: 2 * max_object_bytes,
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let receiver = Receiver::start(listener, options, intake.clone()).unwrap();
    Bench {
        store,
        intake,
        receiver,
    }
}

impl Bench {
    fn send(&self, own: &str, peer: &str, uid: &str, data: &[u8]) -> Result<(), String> {
        let address = self.receiver.address().to_string();
        let instance = Instance {
            class: CR,
            uid,
            data,
        };
        store(&address, own, peer, &instance)
    }
}

#[test]
fn films_come_in_once_and_a_quiet_study_is_complete() {
    let bench = bench(&["MODALITY"], 1 << 20);
    let (one, hand) = (
        film("1.2.1", "1.2.1.1", "CHEST"),
        film("1.2.1", "1.2.1.2", "HAND"),
    );
    bench.send("MODALITY", "XRAY", "1.2.1.1", &one).unwrap();
    bench.send("MODALITY", "XRAY", "1.2.1.1", &one).unwrap();
    bench.send("MODALITY", "XRAY", "1.2.1.2", &hand).unwrap();
    let alone = film("1.2.2", "1.2.2.1", "HAND");
    bench.send("MODALITY", "XRAY", "1.2.2.1", &alone).unwrap();
    assert_eq!(bench.intake.counts.again.load(Ordering::Relaxed), 1);
    let id = bench.store.by_uid("1.2.1").unwrap().unwrap();
    let study = bench.store.study(&id).unwrap();
    assert_eq!(
        (study.films.len(), study.patient.name.as_str()),
        (2, "张^三")
    );
    assert_eq!(study.films[0].kept_out, None);
    assert!(
        study.films[1]
            .kept_out
            .as_ref()
            .is_some_and(|reason| reason.contains("HAND"))
    );
    assert_eq!(bench.intake.complete(Duration::from_secs(60)).unwrap(), 0);
    assert_eq!(bench.intake.complete(Duration::ZERO).unwrap(), 2);
    assert_eq!(bench.store.study(&id).unwrap().state, StudyState::Complete);
    let other = bench.store.by_uid("1.2.2").unwrap().unwrap();
    let failed = bench.store.study(&other).unwrap();
    assert!(failed.state == StudyState::Failed && failed.failure.is_some());
    bench.receiver.stop();
}

#[test]
fn strangers_other_titles_and_other_objects_are_refused() {
    let bench = bench(&["MODALITY"], 4096);
    let one = film("1.2.1", "1.2.1.1", "CHEST");
    assert!(bench.send("STRANGER", "XRAY", "1.2.1.1", &one).is_err());
    assert!(bench.send("MODALITY", "OTHER", "1.2.1.1", &one).is_err());
    let wrong = bench.send("MODALITY", "XRAY", "1.2.1.7", &one).unwrap_err();
    assert!(wrong.contains("A900"), "{wrong}");
    let large = vec![0; 5000];
    let wrong = bench
        .send("MODALITY", "XRAY", "1.2.1.1", &large)
        .unwrap_err();
    assert!(wrong.contains("A700"), "{wrong}");
    let wrong = bench
        .send("MODALITY", "XRAY", "1.2.1.1", &one[..40])
        .unwrap_err();
    assert!(wrong.contains("C000") || wrong.contains("A900"), "{wrong}");
    assert_eq!(bench.store.list(&Query::default()).unwrap().total, 0);
    // What was refused has given its memory back.
    bench.send("MODALITY", "XRAY", "1.2.1.1", &one).unwrap();
    bench.receiver.stop();
}

#[test]
fn a_peer_that_says_nothing_is_let_go_of() {
    let bench = bench(&[], 4096);
    let mut silent: Vec<TcpStream> = (0..4)
        .map(|_| TcpStream::connect(bench.receiver.address()).unwrap())
        .collect();
    for socket in &mut silent {
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        assert_eq!(socket.read(&mut [0; 1]).unwrap_or(0), 0);
    }
    // The places are free when the threads of the silent ones have ended, which a busy machine holds up.
    let one = film("1.2.1", "1.2.1.1", "CHEST");
    let until = Instant::now() + Duration::from_secs(20);
    while let Err(refused) = bench.send("MODALITY", "XRAY", "1.2.1.1", &one) {
        assert!(Instant::now() < until, "{refused}");
        std::thread::sleep(Duration::from_millis(50));
    }
    bench.receiver.stop();
}

/// What a peer sends in an association that stores one film.
fn conversation() -> Vec<u8> {
    let context = |id, class: &str| PresentationContextProposed {
        id,
        abstract_syntax: class.into(),
        transfer_syntaxes: vec!["1.2.840.10008.1.2.1".into()],
    };
    let value = |id, value_type, data| Pdu::PData {
        data: vec![PDataValue {
            presentation_context_id: id,
            value_type,
            is_last: true,
            data,
        }],
    };
    let echo = Command::default()
        .with_uid(element::CLASS, VERIFICATION)
        .with(element::FIELD, ECHO)
        .with(element::ID, 1)
        .with(element::DATA_SET_TYPE, NO_DATA);
    let stored = Command::default()
        .with_uid(element::CLASS, CR)
        .with(element::FIELD, STORE)
        .with(element::ID, 2)
        .with(element::PRIORITY, 0)
        .with(element::DATA_SET_TYPE, 0)
        .with_uid(element::INSTANCE, "1.2.1.1");
    let pdus = [
        Pdu::AssociationRQ(AssociationRQ {
            protocol_version: 1,
            calling_ae_title: "MODALITY".into(),
            called_ae_title: "XRAY".into(),
            application_context_name: "1.2.840.10008.3.1.1.1".into(),
            presentation_contexts: vec![context(1, VERIFICATION), context(3, CR)],
            user_variables: vec![UserVariableItem::MaxLength(16384)],
        }),
        value(1, PDataValueType::Command, echo.bytes()),
        value(3, PDataValueType::Command, stored.bytes()),
        value(3, PDataValueType::Data, film("1.2.1", "1.2.1.1", "CHEST")),
        Pdu::ReleaseRQ,
    ];
    let mut bytes = Vec::new();
    for pdu in &pdus {
        write_pdu(&mut bytes, pdu).unwrap();
    }
    bytes
}

/// Sends `count` damaged conversations; the server is still there for a good one after them.
fn damaged(seed: u64, count: usize) {
    let bench = bench(&[], 1 << 20);
    let whole = conversation();
    let mut random = SmallRng::seed_from_u64(seed);
    for _ in 0..count {
        let mut bytes = whole.clone();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..4) {
                0 => bytes[at] ^= 1 << random.random_range(0..8),
                1 => bytes[at] = random.random(),
                2 => {
                    bytes.remove(at);
                }
                _ => bytes.insert(at, random.random()),
            }
        }
        if random.random_bool(0.2) {
            bytes.truncate(random.random_range(0..bytes.len()));
        }
        let mut socket = TcpStream::connect(bench.receiver.address()).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        // It may have closed already.
        let _ = socket.write_all(&bytes);
        let _ = socket.shutdown(Shutdown::Write);
        let _ = socket.read_to_end(&mut Vec::new());
    }
    std::thread::sleep(Duration::from_millis(500));
    let one = film("1.2.7", "1.2.7.1", "CHEST");
    bench.send("MODALITY", "XRAY", "1.2.7.1", &one).unwrap();
    assert!(bench.receiver.panics() == 0, "an association panicked");
    bench.receiver.stop();
}

#[test]
fn damaged_associations_do_the_server_no_harm() {
    damaged(1, 300);
}

#[test]
#[ignore = "minutes"]
fn many_damaged_associations_do_the_server_no_harm() {
    damaged(2, 20_000);
}
