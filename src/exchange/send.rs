//! C-STORE as a client (SCU): one object over one association.

use std::{
    io::{Read, Write},
    net::{SocketAddr, ToSocketAddrs},
    time::Duration,
};

use dicom_ul::{
    ClientAssociation,
    association::{CloseSocket, client::ClientAssociationOptions},
    pdu::{PDataValue, PDataValueType, Pdu, PresentationContextResultReason},
};

use super::dimse::{Command, STORE, element, status};

/// Explicit little endian, in which reports are written.
const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";

/// Time for a peer to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// An object to be sent: its data set is in explicit little endian.
pub(super) struct Instance<'a> {
    pub(super) class: &'a str,
    pub(super) uid: &'a str,
    /// The data set, without what precedes it in a file.
    pub(super) data: &'a [u8],
}

/// The data set of a file that was written here.
pub(super) fn data_set(file: &[u8]) -> &[u8] {
    let length = file
        .get(140..144)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes);
    file.get(144 + length as usize..).unwrap_or_default()
}

/// Sends an object; its error has no words of the peer but numbers.
pub(super) fn store(
    address: &str,
    own: &str,
    peer: &str,
    instance: &Instance<'_>,
) -> Result<(), String> {
    let addresses: Vec<SocketAddr> = address
        .to_socket_addrs()
        .map_err(|error| format!("its address cannot be found: {error}"))?
        .collect();
    let first = addresses.first().ok_or("its address cannot be found")?;
    let options = ClientAssociationOptions::new()
        .calling_ae_title(own)
        .called_ae_title(peer)
        .with_presentation_context(instance.class, vec![EXPLICIT_LITTLE])
        .connection_timeout(PATIENCE)
        .read_timeout(PATIENCE)
        .write_timeout(PATIENCE);
    let association = options.establish(first).map_err(|error| {
        log::debug!("association: {error}");
        "no association: not reachable, or it refuses our title or reports".to_owned()
    })?;
    converse(association, instance)
}

fn converse<S: Read + Write + CloseSocket>(
    mut association: ClientAssociation<S>,
    instance: &Instance<'_>,
) -> Result<(), String> {
    let contexts = association.presentation_contexts();
    let accepted = contexts
        .iter()
        .find(|one| one.reason == PresentationContextResultReason::Acceptance)
        .map(|one| one.id);
    let Some(context) = accepted else {
        let _ = association.abort();
        return Err("it takes no reports of this kind".into());
    };
    let command = Command::default()
        .with_uid(element::CLASS, instance.class)
        .with(element::FIELD, STORE)
        .with(element::ID, 1)
        .with(element::PRIORITY, 0)
        .with(element::DATA_SET_TYPE, 0)
        .with_uid(element::INSTANCE, instance.uid);
    let broken = |_| "the association broke off".to_owned();
    let value = |value_type, is_last, data: &[u8]| Pdu::PData {
        data: vec![PDataValue {
            presentation_context_id: context,
            value_type,
            is_last,
            data: data.to_vec(),
        }],
    };
    association
        .send(&value(PDataValueType::Command, true, &command.bytes()))
        .map_err(broken)?;
    // Length and header of the value are within the peer's limit; 0 means none.
    let most = match association.acceptor_max_pdu_length() {
        0 => 16 << 10,
        most => (most as usize).clamp(1024, 128 << 10),
    };
    let pieces: Vec<&[u8]> = instance.data.chunks(most - 64).collect();
    for (index, piece) in pieces.iter().enumerate() {
        let last = index + 1 == pieces.len();
        association
            .send(&value(PDataValueType::Data, last, piece))
            .map_err(broken)?;
    }
    let mut answer = Vec::new();
    loop {
        let Pdu::PData { data } = association.receive().map_err(broken)? else {
            let _ = association.abort();
            return Err("it broke off the association".into());
        };
        let mut last = false;
        for value in data {
            answer.extend(value.data);
            last |= value.is_last;
        }
        if answer.len() > super::dimse::MAX_COMMAND {
            let _ = association.abort();
            return Err("its answer is too long".into());
        }
        if last {
            break;
        }
    }
    let code = Command::read(&answer).and_then(|command| command.number(element::STATUS));
    let _ = association.release();
    match code {
        // Warnings mean that the object was kept.
        Some(status::SUCCESS) | Some(0xb000..=0xbfff) | Some(0x0001) => Ok(()),
        Some(code) => Err(format!("it refuses the object with status {code:04X}")),
        None => Err("its answer is damaged".into()),
    }
}
