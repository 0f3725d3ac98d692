//! The protobuf messages of CRIU's images, with the fields that are in use here.
//!
//! Field numbers and types were read from the descriptors of the Python package `pycriu`. Fields
//! that are left out are skipped when read.

/// What a dump says of itself: `inventory.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Inventory {
    /// Version of the images, see [`IMAGES_VERSION_COMPRESSED`].
    #[prost(uint32, required, tag = "1")]
    pub img_version: u32,
}

/// [`Inventory::img_version`] of images with compressed pages, which CRIU up to 4.2 refuses (CRTOOLS_IMAGES_V1_2).
pub const IMAGES_VERSION_COMPRESSED: u32 = 3;

/// A memfd, or memory that CRIU carries as one (from 4.0 on shared anonymous memory too): `memfd.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Memfd {
    /// Its length in bytes.
    #[prost(uint64, required, tag = "4")]
    pub size: u64,
    /// The shared memory in whose pagemap its pages are.
    #[prost(uint64, required, tag = "5")]
    pub shmid: u64,
}

/// First message of a pagemap file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PagemapHead {
    /// Number in the name of the `pages-*.img` that holds the pages.
    #[prost(uint32, required, tag = "1")]
    pub pages_id: u32,
}

/// A run of pages of a pagemap file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PagemapEntry {
    /// Address of the first page.
    #[prost(uint64, required, tag = "1")]
    pub vaddr: u64,
    /// Number of pages as written and read up to CRIU 4.1.1, and read by tools; CRIU writes 0 from 4.2 on.
    #[prost(uint32, required, tag = "2")]
    pub compat_nr_pages: u32,
    /// The flag PARENT as very old versions wrote it. See [`PagemapEntry::wire`] for what else it tells.
    #[prost(bool, optional, tag = "3")]
    pub in_parent: Option<bool>,
    /// See [`crate::criu::header::PageFlags`].
    #[prost(uint32, optional, tag = "4")]
    pub flags: Option<u32>,
    /// Number of pages as written from CRIU 4.2 on.
    #[prost(uint64, optional, tag = "5")]
    pub nr_pages: Option<u64>,
    /// Sizes of the compressed pages (CRIU 4.3).
    #[prost(message, optional, tag = "6")]
    pub blocks: Option<CompressedBlocks>,
}

/// Where the compressed pages of an entry lie in the pages file, one behind the other.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CompressedBlocks {
    /// Stored size of each block in bytes: 0 is a zero block, the full size is raw, else LZ4.
    #[prost(uint32, repeated, tag = "1")]
    pub block_sizes: Vec<u32>,
    /// Sum of all sizes in bytes.
    #[prost(uint64, optional, tag = "2")]
    pub total_payload_size: Option<u64>,
    /// Pages in a block (1 in CRIU 4.3).
    #[prost(uint32, optional, tag = "3")]
    pub pages_per_block: Option<u32>,
}

/// A process or thread: `core-PID.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Core {
    /// What x86-64 has of every thread.
    #[prost(message, optional, tag = "2")]
    pub thread_x86: Option<ThreadInfo>,
    /// What is the process's alone; its threads have none.
    #[prost(message, optional, tag = "3")]
    pub task: Option<TaskCore>,
    /// What every architecture has of every thread.
    #[prost(message, optional, tag = "5")]
    pub thread: Option<ThreadCore>,
    /// What aarch64 has of every thread.
    #[prost(message, optional, tag = "8")]
    pub thread_aarch64: Option<ThreadInfo>,
}

/// The part of [`Core`] that begins alike on x86-64 and aarch64.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ThreadInfo {
    /// The word that the kernel clears at the thread's end (`set_tid_address`), 0 if none.
    #[prost(uint64, required, tag = "1")]
    pub clear_tid_addr: u64,
}

/// The part of [`Core`] that every thread has.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ThreadCore {
    /// The head of the thread's robust futexes (`set_robust_list`), 0 if none.
    #[prost(uint64, required, tag = "1")]
    pub futex_rla: u64,
}

/// The part of [`Core`] that is the process's alone.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskCore {
    /// [`TASK_DEAD`] for a zombie, which has no memory.
    #[prost(uint32, required, tag = "1")]
    pub task_state: u32,
    /// Its name, up to 15 bytes of any kind.
    #[prost(bytes = "vec", optional, tag = "6")]
    pub comm: Option<Vec<u8>>,
}

/// [`TaskCore::task_state`] of a zombie.
pub const TASK_DEAD: u32 = 2;

/// The memory of a process: `mm-PID.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mm {
    /// Where the command line (/proc/PID/cmdline) begins, an address.
    #[prost(uint64, required, tag = "8")]
    pub arg_start: u64,
    /// The first address behind it.
    #[prost(uint64, required, tag = "9")]
    pub arg_end: u64,
    /// Where the environment (/proc/PID/environ) begins, an address.
    #[prost(uint64, required, tag = "10")]
    pub env_start: u64,
    /// The first address behind it.
    #[prost(uint64, required, tag = "11")]
    pub env_end: u64,
    /// The file of its program, by its number in the images.
    #[prost(uint32, required, tag = "12")]
    pub exe_file_id: u32,
    /// The mappings by address, then (from CRIU 4.2.1 on) the guard regions inside them.
    #[prost(message, repeated, tag = "14")]
    pub vmas: Vec<Vma>,
}

/// One mapping of a process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Vma {
    /// First address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// First address behind the mapping.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// Where in its file it begins, bytes.
    #[prost(uint64, required, tag = "3")]
    pub pgoff: u64,
    /// Which shared memory segment it maps, or which file.
    #[prost(uint64, required, tag = "4")]
    pub shmid: u64,
    /// How it may be accessed: PROT_* bits.
    #[prost(uint32, required, tag = "5")]
    pub prot: u32,
    /// How it was mapped: MAP_* bits.
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// What kind of mapping it is: CRIU's VMA_AREA_* and VMA_* bits.
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
    /// Advice that was given (madvise): bit N is advice N.
    #[prost(uint64, optional, tag = "9")]
    pub madv: Option<u64>,
}

/// A task of `pstree.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PstreeEntry {
    /// The task's pid as the images name it.
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    /// Its parent's pid, 0 for the root.
    #[prost(uint32, required, tag = "2")]
    pub ppid: u32,
    /// The thread ids of the task, its own among them; each has a `core-TID.img`.
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub threads: Vec<u32>,
}
