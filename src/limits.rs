//! Every cap on what a peer, a file or a queue may ask for, named.
//!
//! A number from outside is compared with one of these before anything is allocated, indexed or
//! shifted by it.

use std::time::Duration;

/// Most pages that one frame of CRIU's protocol may carry: 64 GiB in 4 KiB pages. CRIU itself never
/// sends more than a pipe holds (4 MiB); the cap leaves room and keeps products far from overflow.
pub const FRAME_PAGES_MAX: u64 = 1 << 24;

/// Most pages that one written pagemap entry covers: 256 MiB in 4 KiB pages. CRIU keeps lengths of
/// entries in `int`s here and there; its own dumps have entries of a few MiB.
pub const ENTRY_PAGES_MAX: u64 = 1 << 16;

/// Number of the first pages file that a page server writes, as CRIU counts, so that it cannot clash
/// with the pages files of the dump itself.
pub const PAGES_ID_FIRST: u32 = 0x1_0001;

/// Longest protobuf message in an image file, bytes. CRIU's own messages stay below 1 MiB, but for
/// block size lists of compressed pagemap entries.
pub const IMAGE_MESSAGE_BYTES_MAX: u32 = 64 << 20;

/// Most directories that the pages of one process tree are laid out in (`--dedup-tree`): one for each fork of a
/// fork that others share pages with. CRIU opens each of them for each process.
pub const TREE_LAYERS_MAX: usize = 16;

/// Bytes of a process's pages that wait in memory until it is known which process it shares pages with.
pub const TREE_SAMPLE_BYTES: usize = 4 << 20;

/// Most bytes of a command line, and of an environment, that a lazy restore brings first: one argument can have as many.
pub const COMMAND_LINE_BYTES_MAX: u64 = 128 << 10;

/// Most directories in a chain of parents.
pub const PARENT_DEPTH_MAX: usize = 1024;

/// Largest shared memory id that a dst_id can name: it has 8 bits beside it for the type.
pub const SHMEM_ID_MAX: u64 = u64::MAX >> 8;

/// Most processes and shared memory segments in one session. Each makes files, so a peer may not ask
/// for any number of them.
pub const SESSION_TARGETS_MAX: usize = 1 << 16;

/// Most ranges of memory in one write (`IOV_MAX` of Linux).
pub const WRITE_RANGES_MAX: usize = 1024;

/// Size of one buffer that a session receives into, bytes. What is received is written while it is in
/// the processor's cache.
pub const RECEIVE_BUFFER_BYTES: usize = 256 << 10;

/// Most such buffers of one session: one is filled while the others are written. With half as many the two
/// threads wait for each other three times as often.
pub const RECEIVE_BUFFERS_MAX: usize = 8;

/// Size of one pipe through which a session moves large frames, bytes. It is what Linux gives anybody
/// (`fs.pipe-max-size`).
pub const RECEIVE_PIPE_BYTES: usize = 1 << 20;

/// A smaller pipe than this, in bytes, is of no use: its calls cost more than a copy.
pub const RECEIVE_PIPE_BYTES_MIN: usize = 256 << 10;

/// Most such pipes of one session. What is in them is memory of the sender or the network until it is
/// in its file.
pub const RECEIVE_PIPES_MAX: usize = 4;

/// Most sessions that receive at once. Each has a few threads and [`RECEIVE_BUFFERS_MAX`] buffers.
pub const RECEIVE_SESSIONS_MAX: usize = 16;

/// The buffers of all receiving sessions together stay below this, bytes.
const RECEIVE_BYTES_MAX: usize = 40 << 20;

const _: () =
    assert!(RECEIVE_SESSIONS_MAX * RECEIVE_BUFFERS_MAX * RECEIVE_BUFFER_BYTES <= RECEIVE_BYTES_MAX);

/// Longest configuration file in CRIU's format, bytes. CRIU has no limit; real ones have some hundred.
pub const CONFIG_FILE_BYTES_MAX: usize = 1 << 20;

/// Longest message of a remote procedure call, bytes. Requests for page servers take a few hundred.
pub const RPC_MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Longest time that may be given as a timeout, seconds: a year. Moments this far away can still be
/// told, and nobody waits longer.
pub const TIMEOUT_S_MAX: u64 = 366 * 24 * 60 * 60;

/// How long a dump may say nothing unless the user says otherwise, seconds. Its processes stand still meanwhile. CRIU
/// itself is done in much less; a plugin that saves the memory of devices in between may need minutes.
pub const DUMP_IDLE_TIMEOUT_S: u64 = 300;

/// How long the processes of a lazy dump stand still for a client or a restore that does not come, unless
/// the user says otherwise, seconds.
pub const RESTORE_TIMEOUT_S: u64 = 600;

/// How long to wait at the start for the images and the port of a dump, unless the user says otherwise.
pub const START_WAIT_DEFAULT: Duration = Duration::from_secs(10);

/// Longest request for metrics, bytes.
pub const HTTP_REQUEST_BYTES_MAX: usize = 8 << 10;

/// Most lines that wait for the log's disk before new ones are dropped.
pub const LOG_LINES_MAX: usize = 8192;

/// Bytes of requests read from a client at once.
pub const REQUEST_BYTES: usize = 16 << 10;

/// Bytes of answers gathered for a client before they are sent. More gains nothing: what is read
/// from the page cache should still be in the processor's cache when it goes to the socket.
pub const ANSWER_BYTES: usize = 128 << 10;

/// Bytes of ciphertext received from a TLS peer at once.
pub const TLS_BUFFER_BYTES: usize = 64 << 10;

/// Most extents in one answer; a request for pages of more gets a short answer.
pub const ANSWER_EXTENTS_MAX: usize = 1024;

/// Most clients served at once.
pub const CLIENTS_MAX: usize = 128;

/// Ciphertext that waits to be sent to a TLS peer, bytes.
pub const TLS_OUTGOING_BYTES: usize = 128 << 10;

/// The buffers of all clients together stay below this, bytes.
const CLIENT_BUFFERS_MAX: usize = 48 << 20;

const _: () = assert!(
    CLIENTS_MAX * (REQUEST_BYTES + ANSWER_BYTES + TLS_BUFFER_BYTES + TLS_OUTGOING_BYTES)
        <= CLIENT_BUFFERS_MAX
);

/// Most pages of a lazy dump that are held for clients: 4 TiB in 4 KiB pages. Each costs two bits of
/// memory besides its own place.
pub const DUMP_PAGES_MAX: u64 = 1 << 30;

/// Longest file of page hashes, bytes: what stands around the 16 bytes of a page takes less than as many again.
pub const HASHES_FILE_BYTES_MAX: u64 = DUMP_PAGES_MAX * 32;

/// Most pages that one request may make wait until they have come from the dump; a longer request gets
/// a short answer.
pub const WANTED_PAGES_MAX: u64 = 64;

/// Most bytes of pages in one batch of ferry's stream.
pub const FERRY_BATCH_BYTES_MAX: usize = 256 << 10;

/// Most runs in one batch of ferry's stream. With the 64 pages of a batch no more than 64 runs can
/// have contents; the rest is room for holes between them.
pub const FERRY_RUNS_MAX: usize = 512;

/// Longest body of a ferry frame, bytes: the pages of a batch and its tables.
pub const FERRY_BODY_BYTES_MAX: usize = FERRY_BATCH_BYTES_MAX + (32 << 10);

/// Longest hello, bytes. Version 1 has 72; later ones may append.
pub const FERRY_HELLO_BYTES_MAX: usize = 1024;

/// Longest text in a FAIL frame, bytes.
pub const FERRY_TEXT_BYTES_MAX: usize = 1024;

/// Most hashes in one HASHES frame.
pub const FERRY_HASHES_MAX: usize = 4096;

/// Most connections of one session.
pub const FERRY_STREAMS_MAX: u16 = 64;

/// Most frames that may be on their way without an acknowledgement.
pub const FERRY_WINDOW_FRAMES_MAX: u32 = 4096;

/// Most bytes of frames that may be on their way without an acknowledgement.
pub const FERRY_WINDOW_BYTES_MAX: u64 = 1 << 30;

/// Most questions for hashes that may wait for their answers on a connection.
pub const FERRY_QUESTIONS_MAX: usize = 64;

/// Most sessions that a listening side has at a time.
pub const FERRY_SESSIONS_MAX: usize = 256;

/// How many failed sessions, and how many that went well, are remembered, so that whoever comes back to one
/// learns how it ended.
pub const FERRY_ENDED_SESSIONS_MAX: usize = 64;

/// Most pages that one fault may ask for: the page and its neighbours.
pub const FERRY_FAULT_PAGES_MAX: u32 = 64;

const _: () =
    assert!(40 + FERRY_RUNS_MAX * 16 + 64 * 3 <= FERRY_BODY_BYTES_MAX - FERRY_BATCH_BYTES_MAX);
const _: () = assert!(FERRY_RUNS_MAX <= u16::MAX as usize);
const _: () = assert!(16 + FERRY_HASHES_MAX * (16 + 16) <= FERRY_BODY_BYTES_MAX);
const _: () = assert!(FRAME_PAGES_MAX.checked_mul(1 << 16).is_some());

/// Most bytes of pages that are kept for processes that cannot take them at the moment; what comes
/// beyond is asked for again.
pub const STASH_BYTES_MAX: u64 = 32 << 20;

/// Longest name of a migration, bytes: it is a directory's name with room for more.
pub const MIGRATION_ID_BYTES_MAX: usize = 64;

/// Longest name of a container, bytes: runc takes no longer one.
pub const CONTAINER_ID_BYTES_MAX: usize = 1024;

/// Longest name of a network interface, bytes (IFNAMSIZ without its zero).
pub const INTERFACE_BYTES_MAX: usize = 15;

/// Most addresses that move with one tree.
pub const MIGRATION_ADDRESSES_MAX: usize = 64;

/// Most processes of a tree that is moved.
pub const MIGRATION_PIDS_MAX: usize = 16_384;

/// Longest JSON body that a migration's peer may send, bytes: one pid of [`MIGRATION_PIDS_MAX`] takes 8.
pub const MIGRATION_JSON_BYTES_MAX: usize = 1 << 20;

/// Most bytes of image files without pages that are taken for one migration.
pub const MIGRATION_IMAGES_BYTES_MAX: u64 = 64 << 30;

/// Most files of one migration's image directory.
pub const MIGRATION_IMAGE_FILES_MAX: usize = 1 << 20;

/// Most migrations that an agent has at a time.
pub const MIGRATIONS_MAX: usize = 64;

/// Most files of a container's image that is started anew.
pub const BUNDLE_FILES_MAX: usize = 16 << 20;

/// Longest text that says how a container shows that it is ready, bytes.
pub const READY_BYTES_MAX: usize = 4 << 10;

/// Longest command that a peer may let the agent run, bytes: shells take arguments of 128 KiB.
pub const COMMAND_BYTES_MAX: usize = 32 << 10;

/// Longest address of a service, bytes: a name of the DNS, and a port.
pub const SERVICE_ADDRESS_BYTES_MAX: usize = 260;

/// Longest line of a migration's event log, bytes.
pub const EVENT_LINE_BYTES_MAX: usize = 64 << 10;

/// Longest text of an event, and longest line of CRIU's log in it, bytes: each byte may take six in JSON.
pub const EVENT_TEXT_BYTES_MAX: usize = 4 << 10;

/// Longest name of a count in an event, bytes.
pub const EVENT_COUNT_NAME_BYTES_MAX: usize = 24;

/// Most counts of an event.
pub const EVENT_COUNTS_MAX: usize = 64;

/// Most bytes that are fetched of one log of the other side, its end.
pub const LOG_FETCH_BYTES_MAX: usize = 1 << 20;

/// Most pipes and files to which a container writes what it prints: standard output and standard error.
pub const OUTPUTS_MAX: usize = 2;

/// Longest name of such a pipe or file, bytes: `file[MOUNT:INODE]` in hexadecimal.
pub const OUTPUT_KEY_BYTES_MAX: usize = 64;

/// Most bytes of a container's log that is taken.
pub const OUTPUT_LOG_BYTES_MAX: u64 = 1 << 40;

/// Most rounds of one migration, and of its directories at the agent.
pub const MIGRATION_ROUNDS_MAX: u32 = 1_000;

/// Directories that lie in each other in a tree that is exported: each is held open meanwhile, and a process may have
/// 1,024 files open unless told otherwise.
pub const EXPORT_DEPTH_MAX: usize = 512;

/// Longest name of a file, bytes: Linux takes no longer one (NAME_MAX).
pub const FILE_NAME_BYTES_MAX: usize = 255;

/// Longest path of a file within a tree that moves, bytes: one system call takes no longer one (PATH_MAX).
pub const FILE_PATH_BYTES_MAX: usize = 4095;

/// Most bytes of operations in one batch of files.
pub const FILE_BATCH_BYTES_MAX: usize = 2 << 20;

/// Most bytes of extended attributes of one file. Linux takes 64 KiB in one value, and as many of names.
pub const FILE_XATTRS_BYTES_MAX: usize = 1 << 20;

/// Most names of a tree of files that moves. Each takes some 300 bytes of memory at both ends.
pub const FILE_NAMES_MAX: usize = 4 << 20;

/// Most blocks of 16 KiB of a tree of files that moves, holes included: 1 TiB. Their hashes take 1 GiB of memory.
pub const FILE_BLOCKS_MAX: u64 = 1 << 26;

/// Longest index of a tree of files, bytes: [`FILE_BLOCKS_MAX`] hashes, and 1 GiB for names and attributes.
pub const FILE_INDEX_BYTES_MAX: u64 = (FILE_BLOCKS_MAX * 16) + (1 << 30);

/// Most trees of files of one migration: the root of a container, and volumes.
pub const FILE_TREES_MAX: usize = 64;

/// Most layers that an agent keeps, and most that arrive there at a time.
pub const LAYERS_STORED_MAX: usize = 4096;

/// See [`LAYERS_STORED_MAX`].
pub const LAYERS_ARRIVING_MAX: usize = 64;

const _: () = assert!(FILE_XATTRS_BYTES_MAX + FILE_PATH_BYTES_MAX < FILE_BATCH_BYTES_MAX);

/// Longest document of an image (index, manifest, configuration), bytes: registries take no longer manifest.
pub const OCI_DOCUMENT_BYTES_MAX: u64 = 4 << 20;

/// Most layers of an image: overlayfs mounts no more than 500.
pub const OCI_LAYERS_MAX: usize = 500;

/// Most bytes of a client that a recorder passes on, and writes to its log, at once. A service reads as many at
/// once: so what one piece asks for is done before another connection's piece is read.
pub const REPLAY_PIECE_BYTES_MAX: usize = 16 << 10;

/// Longest output of a digest that a log keeps, bytes: room for a few checksums.
pub const REPLAY_DIGEST_BYTES_MAX: usize = 4 << 10;

/// Longest body of an entry of a log, bytes: a piece and its fields.
pub const REPLAY_ENTRY_BYTES_MAX: usize = REPLAY_PIECE_BYTES_MAX + 64;

/// The highest number of a log's file: names have six digits.
pub const REPLAY_FILE_MAX: u32 = 999_999;

/// Most entries of a log. A recorder that wrote one each microsecond would take nine years.
pub const REPLAY_ENTRIES_MAX: u64 = 1 << 48;

/// Bytes of an answer that a log keeps to show where a replay differs.
pub const REPLAY_HEAD_BYTES_MAX: usize = 32;

/// Most connections of a recorder, or of a replay, at a time. Each has two buffers of
/// [`REPLAY_PIECE_BYTES_MAX`] in a recorder.
pub const REPLAY_CONNECTIONS_MAX: usize = 1024;

/// Most bytes of answers on one connection of a replay that the log does not speak of yet, before no more are read.
pub const REPLAY_AHEAD_BYTES_MAX: usize = 256 << 10;

/// Most bytes of a log that are sent to an agent in one request.
pub const REPLAY_BATCH_BYTES_MAX: usize = 256 << 10;

/// Most requests with parts of a log that wait for their replay at an agent: 8 MiB.
pub const REPLAY_BATCHES_MAX: usize = 32;

/// The buffers of a recorder's connections together stay below this, bytes.
const REPLAY_BUFFERS_MAX: usize = 32 << 20;

const _: () = assert!(REPLAY_CONNECTIONS_MAX * 2 * REPLAY_PIECE_BYTES_MAX <= REPLAY_BUFFERS_MAX);
const _: () = assert!(REPLAY_DIGEST_BYTES_MAX <= REPLAY_PIECE_BYTES_MAX);

/// Longest file of rules, bytes.
pub const WATCH_FILE_BYTES_MAX: u64 = 1 << 20;

/// Most rules of a watcher. Each may have a trigger of the kernel's.
pub const WATCH_RULES_MAX: usize = 256;

/// Longest word over a watcher's socket, bytes, with its newline.
pub const WATCH_WORD_BYTES_MAX: usize = 256;

/// Most bytes of records before an entry of an archive: its long name and link, and its extended attributes, of which
/// the kernel takes 64 KiB each.
pub const ARCHIVE_RECORDS_BYTES_MAX: u64 = 4 << 20;

/// Most files of a checkpoint's archive, and most directories: as many as an image directory may have.
pub const ARCHIVE_FILES_MAX: usize = MIGRATION_IMAGE_FILES_MAX;

/// Most pages that a working set names: 16 GiB in 4 KiB pages.
pub const WORKING_SET_PAGES_MAX: u64 = 1 << 22;

/// Longest file of a working set, bytes.
pub const WORKING_SET_FILE_BYTES_MAX: u64 = 128 << 20;
