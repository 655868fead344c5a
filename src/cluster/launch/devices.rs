//! Which devices a process of a launch takes.

use super::{Launch, LaunchError, wrong};

impl Launch {
    /// The devices of this process: those that were named, shared out where a launcher starts one process a
    /// card. `visible` is `CUDA_VISIBLE_DEVICES`; `on_cuda` says whether CUDA would be used without a name.
    ///
    /// # Errors
    /// [`LaunchError`]: names and launcher do not agree.
    pub fn devices(
        &self,
        named: &[String],
        visible: Option<&str>,
        on_cuda: bool,
    ) -> Result<Vec<String>, LaunchError> {
        let visible = visible.map(|list| {
            let cards = list.split(',').map(str::trim);
            cards.filter(|card| !card.is_empty()).count()
        });
        let is_cuda = |name: &String| name.starts_with("cuda");
        let Some(local) = self.local else {
            return match (self.devices, named) {
                (None | Some(0), _) => Ok(named.to_vec()),
                (Some(1), []) => Ok(Vec::new()),
                (Some(cards), []) if on_cuda => {
                    Ok((0..cards).map(|card| format!("cuda:{card}")).collect())
                }
                (Some(_), []) => Ok(Vec::new()),
                (Some(cards), named) if named.len() == cards => Ok(named.to_vec()),
                (Some(cards), named) => Err(wrong(format!(
                    "NPROC_PER_NODE is {cards} and `device` names {} ({}); leave one of them out",
                    named.len(),
                    named.join(", ")
                ))),
            };
        };
        match (named, local.size) {
            // A launcher that shows each process its own card.
            ([], _) if on_cuda && visible == Some(1) => Ok(vec!["cuda:0".into()]),
            ([], Some(1)) => Ok(Vec::new()),
            ([], _) if on_cuda => Ok(vec![format!("cuda:{}", local.rank)]),
            ([], _) => Ok(Vec::new()),
            (named, Some(size)) if named.len() == size && size > 1 => {
                Ok(vec![named[local.rank].clone()])
            }
            ([one], size) => {
                let shared = is_cuda(one) && visible != Some(1) && size != Some(1);
                if shared && (size.is_some() || local.rank > 0) {
                    return Err(wrong(format!(
                        "`device` is `{one}` in each of the processes that the launcher starts on this machine; leave it out (each takes the card of its LOCAL_RANK) or name one a process"
                    )));
                }
                Ok(named.to_vec())
            }
            (named, Some(1)) => Ok(named.to_vec()),
            (named, size) => Err(wrong(format!(
                "`device` names {} ({}), and the launcher starts {} on this machine; name as many, or none",
                named.len(),
                named.join(", "),
                match size {
                    Some(size) => format!("{size} processes"),
                    None => "one process a card".into(),
                }
            ))),
        }
    }
}
