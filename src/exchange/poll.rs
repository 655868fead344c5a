//! Polls a DICOMweb service for new films.

use std::collections::HashSet;

use chrono::{DateTime, Duration};

use super::{dicomweb::Service, intake::Intake};
use crate::store::{Actor, now};

/// Studies of a look.
const MOST_STUDIES: usize = 200;

/// What is read of a service.
pub struct Polled {
    service: Service,
    /// Days of study before today that are looked at.
    days: i64,
    max_object_bytes: u64,
    /// Instances that were taken or refused.
    known: HashSet<String>,
}

impl Polled {
    /// Asks the service at `base` about studies of today and `days` before.
    pub fn new(
        base: &str,
        authorization: Option<String>,
        days: u32,
        max_object_bytes: u64,
    ) -> Self {
        Self {
            service: Service::new(base, authorization),
            days: i64::from(days),
            max_object_bytes,
            known: HashSet::new(),
        }
    }

    /// Looks once; the number of films that were new.
    ///
    /// # Errors
    /// Why the service gave no answer that can be used.
    pub fn look(&mut self, intake: &Intake) -> Result<usize, String> {
        let today = DateTime::from_timestamp_millis(now()).ok_or("the clock is wrong")?;
        let since = (today - Duration::days(self.days))
            .format("%Y%m%d")
            .to_string();
        let actor = Actor {
            name: "dicomweb".into(),
            role: "server",
        };
        let mut taken = 0;
        let found = self.service.instances(&since, MOST_STUDIES)?;
        // What is no longer listed is let go of, so that this does not grow.
        let listed: HashSet<&str> = found
            .iter()
            .map(|[_, _, instance]| instance.as_str())
            .collect();
        self.known.retain(|uid| listed.contains(uid.as_str()));
        for address in &found {
            let instance = &address[2];
            if self.known.contains(instance) {
                continue;
            }
            let file = self.service.instance(address, self.max_object_bytes)?;
            match intake.take(file, Some(instance), "dicomweb", &actor) {
                Ok(received) => taken += usize::from(!received.again),
                Err(super::intake::IntakeError::Store(
                    error @ (crate::store::StoreError::Full(_)
                    | crate::store::StoreError::Failed(_)),
                )) => {
                    return Err(error.to_string());
                }
                Err(error) => log::warn!("a film of the DICOMweb service is refused: {error}"),
            }
            self.known.insert(instance.clone());
        }
        Ok(taken)
    }
}
