//! Processes as threads: what they do together, and how each of the ways ends in which one does not.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use super::{
    chain::{Chain, Part},
    hub::PURPOSE,
    launch::Address,
    wire::{Frame, Kind, introduce, write_frame},
    *,
};

/// A port that was free a moment ago.
fn port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn launch(rank: usize, processes: usize, port: u16) -> Launch {
    Launch {
        processes,
        rank,
        master: Address {
            host: "127.0.0.1".into(),
            port,
        },
        local: None,
        devices: None,
        source: "a test".into(),
        id: None,
    }
}

fn meeting(rank: usize, processes: usize, port: u16, patience: f64) -> Meeting {
    Meeting {
        launch: launch(rank, processes, port),
        key: Key::load(Some("secret"), None).unwrap(),
        bind: None,
        program: "program 1".into(),
        devices: vec!["cpu".into()],
        patience: Duration::from_secs_f64(patience),
        tell: Arc::new(|_| {}),
    }
}

/// Runs `work` as each of some processes.
fn together<R: Send>(
    count: usize,
    patience: f64,
    work: impl Fn(Arc<Cluster>) -> R + Sync,
) -> Vec<R> {
    let port = port();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|rank| {
                let work = &work;
                scope.spawn(move || {
                    work(Cluster::meet(meeting(rank, count, port, patience)).unwrap())
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

fn ended(result: Result<Vec<Vec<u8>>, ClusterError>) -> String {
    match result.unwrap_err() {
        ClusterError::Ended(reason) => reason,
        other => panic!("{other}"),
    }
}

#[test]
fn parts_come_in_the_order_of_the_processes() {
    let results = together(4, 60.0, |cluster| {
        let mut all = Vec::new();
        for round in 0..20u8 {
            let own = [cluster.rank() as u8, round];
            // Later ones first, now and then.
            if (cluster.rank() + usize::from(round)) % 3 == 0 {
                thread::sleep(Duration::from_millis(3));
            }
            all.push(cluster.gather("counting", &own).unwrap());
        }
        assert_eq!(
            (cluster.first_device(), cluster.devices()),
            (cluster.rank(), 4)
        );
        cluster.finish().unwrap();
        all
    });
    for all in results {
        for (round, parts) in all.into_iter().enumerate() {
            let right: Vec<Vec<u8>> = (0..4).map(|rank| vec![rank, round as u8]).collect();
            assert_eq!(parts, right);
        }
    }
}

#[test]
fn each_job_is_taken_once_and_results_reach_the_first() {
    let results = together(3, 60.0, |cluster| {
        let mut own = Vec::new();
        loop {
            let job = cluster.take().unwrap();
            if job >= 50 {
                break;
            }
            own.push(job);
            cluster.post(job.to_le_bytes().to_vec());
        }
        let mut posts = Vec::new();
        while cluster.is_first() && posts.len() < 50 {
            let post = cluster.next_post(Duration::from_secs(30)).unwrap().unwrap();
            posts.push(u64::from_le_bytes(post.1.try_into().unwrap()));
        }
        cluster.finish().unwrap();
        (own, posts)
    });
    let mut all: Vec<u64> = results.iter().flat_map(|(own, _)| own.clone()).collect();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..50));
    let mut posts = results[0].1.clone();
    posts.sort_unstable();
    assert!(posts.into_iter().eq(0..50));
}

#[test]
fn one_that_leaves_fails_or_does_something_else_is_named_everywhere() {
    let host = |rank: usize| format!("node {rank} (`");
    // Each without a word of its own to say but its connection.
    for culprit in [1, 2, 0] {
        let results = together(3, 60.0, |cluster| {
            cluster.gather("beginning", &[]).unwrap();
            cluster.set_last("the last checkpoint is `checkpoint-4`".into());
            if cluster.rank() == culprit {
                cluster.fail("out of memory");
                return String::new();
            }
            ended(cluster.gather("counting", &[]))
        });
        for (rank, text) in results
            .iter()
            .enumerate()
            .filter(|(rank, _)| *rank != culprit)
        {
            assert!(
                text.contains(&host(culprit)) && text.contains("failed: out of memory"),
                "{rank}: {text}"
            );
            assert!(
                text.ends_with("the last checkpoint is `checkpoint-4`"),
                "{text}"
            );
        }
    }
    let results = together(3, 60.0, |cluster| match cluster.rank() {
        2 => ended(cluster.gather("validating", &[])),
        _ => ended(cluster.gather("counting", &[])),
    });
    for text in &results {
        assert!(
            text.contains("is at validating while") || text.contains("is at counting while"),
            "{text}"
        );
        assert!(text.contains(&host(2)), "{text}");
    }
    // One that never comes.
    let started = Instant::now();
    let results = together(3, 1.0, |cluster| match cluster.rank() {
        1 => {
            let reason = cluster.verdict("nothing".into());
            reason.to_string()
        }
        _ => ended(cluster.gather("counting", &[])),
    });
    for text in &results {
        assert!(
            text.contains(&host(1)) && text.contains("did not come to counting within 1 s"),
            "{text}"
        );
    }
    assert!(started.elapsed() < Duration::from_secs(10));
}

/// A process that says who it is, and from then on nothing.
fn mute(rank: usize, processes: usize, port: u16) -> TcpStream {
    let end = Instant::now() + Duration::from_secs(20);
    let stream = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(20)),
            Err(error) => panic!("{error}"),
        }
    };
    introduce(&stream, &Key::load(Some("secret"), None).unwrap(), PURPOSE).unwrap();
    let peer = Peer {
        rank,
        processes,
        host: "mute".into(),
        program: "program 1".into(),
        devices: vec!["cpu".into()],
        id: None,
        noun: "node".into(),
    };
    let hello = Frame::new(Kind::Hello, serde_json::to_vec(&peer).unwrap());
    write_frame(&mut &stream, &hello).unwrap();
    stream
}

#[test]
fn one_that_is_silent_is_named_and_one_whose_machine_is_gone_as_well() {
    for is_cut in [false, true] {
        let port = port();
        let text = thread::scope(|scope| {
            let first = scope.spawn(move || {
                let cluster = Cluster::meet(meeting(0, 2, port, 1.0)).unwrap();
                ended(cluster.gather("counting", &[]))
            });
            let stream = mute(1, 2, port);
            if is_cut {
                thread::sleep(Duration::from_millis(200));
                drop(stream);
                return first.join().unwrap();
            }
            let text = first.join().unwrap();
            drop(stream);
            text
        });
        let says = match is_cut {
            true => "node 1 (`mute`) left",
            // Either clock may be the first.
            false => "node 1 (`mute`) ",
        };
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn those_that_do_not_belong_are_turned_away_and_the_others_meet() {
    let port = port();
    let said: Arc<Mutex<Vec<String>>> = Arc::default();
    thread::scope(|scope| {
        let told = said.clone();
        let first = scope.spawn(move || {
            let cluster = Cluster::meet(Meeting {
                tell: Arc::new(move |line| told.lock().unwrap().push(line.to_string())),
                ..meeting(0, 2, port, 60.0)
            })
            .unwrap();
            cluster.finish().unwrap();
        });
        // Connects, says nothing, and stays: it must not be in the way.
        let connect = || loop {
            if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
                return stream;
            }
            thread::sleep(Duration::from_millis(20));
        };
        let slow = connect();
        let mut garbage = connect();
        garbage
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let _ = garbage.write_all(&[0; 100]);
        let mut rest = Vec::new();
        let _ = garbage.read_to_end(&mut rest);
        // What is sent to a stranger is the greeting and nothing else.
        assert!(rest.len() <= 42 + 32, "{}", rest.len());

        let wrong = Cluster::meet(Meeting {
            key: Key::load(Some("guess"), None).unwrap(),
            ..meeting(1, 2, port, 2.0)
        });
        let text = wrong.err().unwrap().to_string();
        assert!(text.contains("another key"), "{text}");
        let none = Cluster::meet(Meeting {
            key: Key::default(),
            ..meeting(1, 2, port, 2.0)
        });
        assert!(none.is_err());
        let twice = Cluster::meet(meeting(0, 3, port, 2.0).into_rank(2));
        let text = twice.err().unwrap().to_string();
        assert!(text.contains("one of 3 nodes"), "{text}");
        let other = Cluster::meet(Meeting {
            launch: Launch {
                id: Some("yesterday".into()),
                ..launch(1, 2, port)
            },
            ..meeting(1, 2, port, 2.0)
        });
        let text = other.err().unwrap().to_string();
        assert!(text.contains("another start of the launcher"), "{text}");

        let second = Cluster::meet(meeting(1, 2, port, 60.0)).unwrap();
        // Too late.
        let late = Cluster::meet(meeting(1, 2, port, 2.0)).err().unwrap();
        assert!(late.to_string().contains("is here already"), "{late}");
        second.finish().unwrap();
        drop(second);
        first.join().unwrap();
        drop(slow);
    });
    let said = said.lock().unwrap().join("\n");
    for piece in ["was turned away", "another program", "is refused"] {
        assert!(said.contains(piece), "{said}");
    }
}

impl Meeting {
    fn into_rank(mut self, rank: usize) -> Self {
        self.launch.rank = rank;
        self
    }
}

#[test]
fn those_that_do_not_come_and_other_programs_are_named() {
    let port = port();
    let error = Cluster::meet(meeting(0, 3, port, 0.5)).err().unwrap();
    let text = error.to_string();
    assert!(
        text.contains("node 1, node 2 of 3 did not come within 0.5 s; here are node 0 (`"),
        "{text}"
    );
    let error = Cluster::meet(meeting(1, 3, port, 0.5)).err().unwrap();
    let text = error.to_string();
    assert!(text.contains("does not answer at 127.0.0.1"), "{text}");

    let port = self::port();
    let texts: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|rank| {
                scope.spawn(move || {
                    let meeting = Meeting {
                        program: format!("program {rank}"),
                        ..meeting(rank, 2, port, 20.0)
                    };
                    Cluster::meet(meeting).err().unwrap().to_string()
                })
            })
            .collect();
        threads.into_iter().map(|one| one.join().unwrap()).collect()
    });
    for text in texts {
        assert!(
            text.contains("runs program 1 and node 0") || text.contains("left"),
            "{text}"
        );
    }
}

#[test]
fn a_sum_has_the_bits_of_one_process_that_adds_in_order() {
    // More numbers than a piece, so that pieces are in flight together.
    let lengths = [5usize, 200_000, 3, 7];
    let value = |part: usize, place: usize, at: usize| {
        let seed = (part * 31 + place * 7 + at * 13) as f32;
        (seed * 0.731).sin() * 10f32.powi((part % 7) as i32 - 3)
    };
    for processes in [2usize, 3, 4] {
        let parts: Vec<Part> = (0..2 * processes + 1)
            .map(|part| {
                let row = |(place, length): (usize, &usize)| {
                    // Some have nothing in some places; nobody has anything in the last.
                    let is_there = place != 3 && (part + place) % 3 != 0;
                    is_there.then(|| (0..*length).map(|at| value(part, place, at)).collect())
                };
                lengths.iter().enumerate().map(row).collect()
            })
            .collect();
        let mut right: Part = vec![None; lengths.len()];
        for part in &parts {
            for (sum, row) in right.iter_mut().zip(part) {
                match (sum.as_mut(), row) {
                    (Some(sum), Some(row)) => {
                        sum.iter_mut().zip(row).for_each(|(sum, new)| *sum += new);
                    }
                    (None, Some(row)) => *sum = Some(row.clone()),
                    _ => {}
                }
            }
        }
        let results = together(processes, 60.0, |cluster| {
            let chain = Chain::open(&cluster).unwrap();
            // The first has one part more than the others.
            let rank = cluster.rank();
            let own = match rank {
                0 => 0..3,
                _ => 2 * rank + 1..2 * rank + 3,
            };
            let sums: Vec<Part> = (0..3)
                .map(|_| chain.sum(&cluster, &lengths, &parts[own.clone()]).unwrap())
                .collect();
            cluster.finish().unwrap();
            sums
        });
        for sums in results.into_iter().flatten() {
            for (place, (sum, right)) in sums.iter().zip(&right).enumerate() {
                let bits = |row: &Option<Vec<f32>>| -> Option<Vec<u32>> {
                    row.as_ref()
                        .map(|row| row.iter().map(|value| value.to_bits()).collect())
                };
                assert!(
                    bits(sum) == bits(right),
                    "{processes} processes, place {place}"
                );
            }
        }
    }
}

#[test]
fn a_sum_ends_when_a_process_is_gone() {
    let results = together(3, 60.0, |cluster| {
        let chain = Chain::open(&cluster).unwrap();
        if cluster.rank() == 1 {
            cluster.fail("the power went");
            return String::new();
        }
        let own = vec![Some(vec![1.0f32; 100_000])];
        let error = chain.sum(&cluster, &[100_000], &[own]).unwrap_err();
        error.to_string()
    });
    for rank in [0, 2] {
        assert!(results[rank].contains("node 1 (`"), "{}", results[rank]);
        assert!(
            results[rank].contains("the power went"),
            "{}",
            results[rank]
        );
    }
}
