//! Records and messages on local sockets and between agents, and recorded traces.

use pageferry::criu::lazy_socket::{RECORD_BYTES, Record};
use pageferry::criu::rpc::{Options, Request, ServerInfo, kind};
use pageferry::criu::rpc_fields::Fields;
use pageferry::limits::RPC_MESSAGE_BYTES_MAX;
use pageferry::migration::messages::{
    Begin, Check, ContainerAddresses, ContainerBegin, ContainerCreate, ContainerId, ContainerStart,
    ContainerStatus, HostFacts, MigrationId, Output, OutputSeal, OutputStatus, Problem, Receiver,
    ReplayAddresses, ReplayBegin, ReplayFinish, ReplayStart, ReplayStatus, RestoreRequest, Seal,
    Status, Wanted,
};
use pageferry::observe::trace::{CSV_HEAD, TraceReader, TraceWriter};
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{byte, canary, scratch};

/// The records of `lazy-pages.socket`.
pub(crate) fn lazy_socket(data: &[u8]) {
    let mut processes = 0;
    for record in data.chunks_exact(RECORD_BYTES) {
        let bytes = <[u8; RECORD_BYTES]>::try_from(record).expect("as long as a record");
        let word = i32::from_le_bytes(bytes);
        match Record::decode(bytes) {
            Record::Process(pid) => {
                assert_eq!(i64::from(pid), i64::from(word));
                processes += 1;
            }
            Record::Zombie(pid) => assert_eq!(i64::from(pid), -i64::from(word)),
            Record::Finished => {
                canary(processes > 0);
                break;
            }
        }
    }
}

/// A process, a zombie, the end.
pub(crate) fn lazy_seeds() -> Vec<Vec<u8>> {
    let words = [7_u32, 0_u32.wrapping_sub(8), 0x5253_5446];
    vec![words.iter().flat_map(|word| word.to_le_bytes()).collect()]
}

/// Requests of CRIU's remote procedure calls, as the page-server and as the shim read them.
pub(crate) fn rpc(data: &[u8]) {
    let read = Fields::decode(data);
    if let Ok(fields) = &read {
        assert!(data.len() <= RPC_MESSAGE_BYTES_MAX);
        let again = Fields::decode(&fields.encode()).expect("what was written is read");
        assert_eq!(*fields, again);
        if let Ok(options) = fields.message(2) {
            let _ = (options.int(1), options.is_on(48), options.message(11));
        }
    }
    if let Ok(request) = Request::decode(data) {
        let again = Request::decode(request.encode_to_vec().as_slice());
        assert_eq!(Ok(&request), again.as_ref());
        // Prost takes more than Fields: groups, for one.
        let port = request.options.and_then(|options| options.server?.port);
        canary(read.is_ok() && port.is_some_and(|port| port > 0));
    }
}

/// A request as go-criu sends it.
pub(crate) fn rpc_seeds() -> Vec<Vec<u8>> {
    let options = Options {
        images_dir_fd: 5,
        log_level: Some(4),
        log_file: Some("server.log".into()),
        server: Some(ServerInfo {
            address: Some("127.0.0.1".into()),
            port: Some(0),
            ..ServerInfo::default()
        }),
        parent_img: Some("../1".into()),
        ..Options::default()
    };
    let request = Request {
        kind: kind::PAGE_SERVER_CHLD,
        options: Some(options),
        keep_open: Some(true),
        pid: Some(7),
    };
    vec![request.encode_to_vec()]
}

/// Messages between the two sides of a migration.
pub(crate) fn migration(mut data: &[u8]) {
    match byte(&mut data) % 22 {
        0 => {
            if let Some(begin) = json::<Begin>(data)
                && begin.check().is_ok()
            {
                assert!(!begin.pids.contains(&0) && !begin.pids.is_empty());
                assert!(begin.outputs.iter().all(Output::is_possible));
                // No seed is so patient.
                canary(begin.timeout_s > 60);
            }
        }
        1 => drop(json::<HostFacts>(data)),
        2 => drop(json::<Wanted>(data)),
        3 => drop(json::<Check>(data)),
        4 => drop(json::<Receiver>(data)),
        5 => drop(json::<RestoreRequest>(data)),
        6 => drop(json::<Status>(data)),
        7 => drop(json::<Problem>(data)),
        8 => drop(json::<Seal>(data)),
        9 => {
            let begin = json::<ContainerBegin>(data);
            let _ = begin.map(|begin| begin.check());
        }
        10 => drop(json::<ContainerCreate>(data)),
        11 => drop(json::<ContainerStart>(data)),
        13 => drop(json::<OutputStatus>(data)),
        14 => drop(json::<OutputSeal>(data)),
        15 => drop(json::<ContainerStatus>(data)),
        16 => drop(json::<ContainerAddresses>(data)),
        17 => {
            let begin = json::<ReplayBegin>(data);
            let _ = begin.map(|begin| (begin.check(), begin.stall()));
        }
        18 => drop(json::<ReplayStart>(data)),
        19 => drop(json::<ReplayFinish>(data).map(|finish| finish.check())),
        20 => drop(json::<ReplayAddresses>(data).map(|addresses| addresses.check())),
        21 => drop(json::<ReplayStatus>(data)),
        _ => names(&String::from_utf8_lossy(data)),
    }
}

/// Names in paths of requests, which become names of directories and words of command lines.
fn names(text: &str) {
    let is_one_name = |name: &str| {
        let path = std::path::Path::new(name);
        path.file_name() == Some(name.as_ref()) && !name.starts_with('-')
    };
    if let Ok(id) = text.parse::<MigrationId>() {
        assert!(is_one_name(&id.to_string()));
    }
    if let Ok(id) = text.parse::<ContainerId>() {
        assert!(is_one_name(id.as_str()));
    }
}

fn json<T: Serialize + DeserializeOwned>(data: &[u8]) -> Option<T> {
    let message: T = serde_json::from_slice(data).ok()?;
    let written = serde_json::to_vec(&message).expect("it can be written");
    let again: T = serde_json::from_slice(&written).expect("what was written is read");
    let twice = serde_json::to_vec(&again).expect("it can be written");
    assert_eq!(written, twice, "it comes back as it was");
    Some(message)
}

/// The messages of a pre-copy.
pub(crate) fn migration_seeds() -> Vec<Vec<u8>> {
    let begin = br#"{"id":"m-1","mode":"pre-copy","pids":[7,8],"memory_bytes":4096,"tcp":"refuse","timeout_s":30}"#;
    let address = br#"{"id":"m-1","mode":"hybrid","pids":[7],"memory_bytes":1,"tcp":"close","timeout_s":3,"addresses":[{"address":"10.0.0.7","prefix":24,"device":"eth0"}]}"#;
    let container = br#"{"id":"m-1","mode":"cold","pids":[7],"memory_bytes":1,"tcp":"refuse","timeout_s":30,"container":{"id":"c","runtime":"runc","bundle":"/b","bundle_is_given":false,"config":{},"resources":null},"files":[{"path":null,"replace":true}],"outputs":[{"key":"pipe:[47]","path":"/var/c","mode":420,"uid":0,"gid":0}]}"#;
    let replay = br#"{"id":"m-1","address":"[::1]:80","start":"x","feed":null,"verify":true,"wait_us":2000,"stall_ms":100,"timeout_s":30}"#;
    [
        (0, begin.as_slice()),
        (0, container),
        (11, br#"{"ready":"http://[::1]/x","limit_ms":100}"#),
        (13, br#"{"bytes":1,"sealed":true}"#),
        (17, replay),
        (19, br#"{"sent":1,"digest":"x"}"#),
        (0, address),
        (3, br#"{"runtime":null,"problems":["no criu"]}"#),
        (4, br#"{"port":27000}"#),
        (5, br#"{"memory_port":null}"#),
        (8, br#"{"digest":"0011223344556677"}"#),
        (
            10,
            br#"{"sha256":"0000000000000000000000000000000000000000000000000000000000000000"}"#,
        ),
        (12, b"m-1"),
    ]
    .into_iter()
    .map(|(kind, text)| [&[kind], text].concat())
    .collect()
}

/// Recordings of `lazy-client --trace`.
pub(crate) fn trace(data: &[u8]) {
    let dir = scratch::directory();
    let path = dir.path().join("trace");
    std::fs::write(&path, data).expect("a file is written");
    if let Ok(reader) = TraceReader::open(&path) {
        let mut records = 0;
        for record in reader {
            let Ok(record) = record else {
                break;
            };
            records += 1;
            let columns = record.to_string().split(',').count();
            assert_eq!(columns, CSV_HEAD.split(',').count());
        }
        assert!(24 * records <= data.len(), "each record takes some bytes");
        canary(records == 2);
    }
}

/// Recordings of one fault and a bit more, of this version and the first one.
pub(crate) fn trace_seeds() -> Vec<Vec<u8>> {
    let dir = scratch::directory();
    let path = dir.path().join("trace");
    let page = pageferry::units::PageSize::KIB_4;
    let writer = TraceWriter::create(&path, page);
    writer
        .and_then(TraceWriter::finish)
        .expect("a trace is written");
    let head = std::fs::read(&path).expect("it was written");
    let old = [b"PFTRACE1", &head[8..]].concat();
    let with = |head: &[u8], bytes: usize| [head, &vec![0; bytes]].concat();
    // The second record lacks its last bytes.
    vec![head.clone(), with(&head, 48 + 40), with(&old, 24 + 16)]
}
