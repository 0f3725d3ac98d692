//! CRIU's remote procedure calls, as far as they are about page servers: messages over a
//! SOCK_SEQPACKET socket.
//!
//! Field numbers and types were read from the descriptors of the Python package `pycriu`; what is not
//! in use here is skipped when read.

/// Numbers of requests and of their answers.
pub mod kind {
    /// Answer to a request that is not understood.
    pub const EMPTY: i32 = 0;
    /// Dump.
    pub const DUMP: i32 = 1;
    /// Restore.
    pub const RESTORE: i32 = 2;
    /// Dump the memory and let the processes run on; further requests follow.
    pub const PRE_DUMP: i32 = 4;
    /// Start a page server in the background.
    pub const PAGE_SERVER: i32 = 5;
    /// Not an answer yet: the client is told how far it is, and answers.
    pub const NOTIFY: i32 = 6;
    /// What this CRIU and kernel can do.
    pub const FEATURE_CHECK: i32 = 9;
    /// How a child ended.
    pub const WAIT_PID: i32 = 11;
    /// Start a page server as a child. CRIU answers with the kind of [`PAGE_SERVER`].
    pub const PAGE_SERVER_CHLD: i32 = 12;
    /// As [`PRE_DUMP`], and nothing follows.
    pub const SINGLE_PRE_DUMP: i32 = 13;
}

/// A request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// See [`kind`].
    #[prost(int32, required, tag = "1")]
    pub kind: i32,
    /// What the command line would say otherwise.
    #[prost(message, optional, tag = "2")]
    pub options: Option<Options>,
    /// Whether more requests follow.
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    /// The child that WAIT_PID is about.
    #[prost(uint32, optional, tag = "6")]
    pub pid: Option<u32>,
}

/// What the command line would say otherwise. Descriptors are those of the client.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Options {
    /// The images directory, or -1.
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    /// `-v`
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    /// `-o`
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    /// Where to listen.
    #[prost(message, optional, tag = "11")]
    pub server: Option<ServerInfo>,
    /// `--prev-images-dir`
    #[prost(string, optional, tag = "14")]
    pub parent_img: Option<String>,
    /// `--auto-dedup`
    #[prost(bool, optional, tag = "16")]
    pub auto_dedup: Option<bool>,
    /// The work directory.
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    /// `--lazy-pages`
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    /// A configuration file that overrides all others.
    #[prost(string, optional, tag = "51")]
    pub config_file: Option<String>,
    /// `--tls-cacert`
    #[prost(string, optional, tag = "54")]
    pub tls_cacert: Option<String>,
    /// `--tls-cacrl`
    #[prost(string, optional, tag = "55")]
    pub tls_cacrl: Option<String>,
    /// `--tls-cert`
    #[prost(string, optional, tag = "56")]
    pub tls_cert: Option<String>,
    /// `--tls-key`
    #[prost(string, optional, tag = "57")]
    pub tls_key: Option<String>,
    /// `--tls`
    #[prost(bool, optional, tag = "58")]
    pub tls: Option<bool>,
    /// `--tls-no-cn-verify`
    #[prost(bool, optional, tag = "59")]
    pub tls_no_cn_verify: Option<bool>,
    /// The images directory by name, if `images_dir_fd` is -1.
    #[prost(string, optional, tag = "68")]
    pub images_dir: Option<String>,
    /// Log to standard error.
    #[prost(bool, optional, tag = "71")]
    pub log_to_stderr: Option<bool>,
}

/// Where a page server listens, and who it is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ServerInfo {
    /// Its address.
    #[prost(string, optional, tag = "1")]
    pub address: Option<String>,
    /// Its port.
    #[prost(int32, optional, tag = "2")]
    pub port: Option<i32>,
    /// Its pid.
    #[prost(int32, optional, tag = "3")]
    pub pid: Option<i32>,
    /// A connection to use instead of listening, a descriptor that the server inherited.
    #[prost(int32, optional, tag = "4")]
    pub socket_fd: Option<i32>,
}

/// An answer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// See [`kind`].
    #[prost(int32, required, tag = "1")]
    pub kind: i32,
    /// Whether it was done.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// The page server that was started.
    #[prost(message, optional, tag = "6")]
    pub server: Option<ServerInfo>,
    /// Why it was not done.
    #[prost(string, optional, tag = "9")]
    pub error: Option<String>,
    /// How a child ended, as `waitpid(2)` tells it.
    #[prost(int32, optional, tag = "11")]
    pub status: Option<i32>,
}

impl Response {
    /// Says that a request of `kind` failed.
    pub fn failed(kind: i32, error: impl std::fmt::Display) -> Response {
        Response {
            kind,
            success: false,
            error: Some(error.to_string()),
            ..Response::default()
        }
    }
}
