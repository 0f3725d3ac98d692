//! Real CRIUs, real processes and two hosts on one machine.
//!
//! The tests, the demo and the benchmarks of pageferry are judged by unmodified CRIUs. This crate
//! fetches them, makes processes whose every page is known, dumps and restores them through either
//! side's transport daemons, and puts networks with a rate and a delay between the two.
//!
//! ```text
//!   criu       finds and fetches real CRIUs         workspace, gate  what a test needs, or skips without
//!   load       the process under test               process, wait    guards, deadlines, Ctrl-C
//!   kinds      a process with every kind of mapping sys              raw memory, mappings: all `unsafe` code
//!   daemons    page-server, lazy-pages, both makes  net, proxy       two hosts; delay, rate, cuts
//!   migration  dump and restore, with all logs      pipes, hugepages settings of the kernel (sysctl)
//!   postcopy   all of it in one                     test_dir, suite  a test's directory, a test per CRIU
//!   rounds     dumps of one load on top of each other images, stats    CRIU's files
//!   containers a host to which they move             control_groups  groups of another host
//!   net_three  two hosts and a client of theirs       bin/echo       a service for it
//!   runc       the same in containers               swrk             CRIU's remote procedure calls
//!   container_host  a host with runc, crun, podman  documents        README's and docs' commands
//!   debian     programs of other Debian suites           orphan         processes whose parent has ended
//!   systemd    a manager of services in namespaces       services         services that move while clients talk
//!   schema     what programs write, by its schema       web            a container without state, and its clients
//!   ssh        a real sshd for two hosts         logind         shutdowns of no host
//!   routes     what leads clients to it                failing        calls that fail, by their number
//!   laboratory what userfaultfd's mechanisms cost    recording      what a program writes, step by step
//!   power_cut  what a cut may leave of those steps
//! ```
//!
//! Invariants: every process, namespace, mount and sysctl belongs to a guard that undoes it on drop;
//! processes are killed by pid and only by who started them; waiting has a condition and a deadline.

pub mod agent;
pub mod announcements;
pub mod container_host;
pub mod container_pair;
pub mod containers;
pub mod control_groups;
pub mod criu;
pub mod daemons;
pub mod debian;
pub mod disk;
pub mod documents;
pub mod dumped_load;
pub mod exchange;
pub mod failing;
pub mod forks;
pub mod gate;
pub mod gocriu;
pub mod hugepages;
pub mod images;
pub mod kinds;
pub mod laboratory;
pub mod load;
pub mod logind;
pub mod memory_group;
pub mod migration;
pub mod mm_operations;
pub mod net;
pub mod net_three;
pub mod orphan;
pub mod pipes;
pub mod pki;
pub mod postcopy;
pub mod power_cut;
pub mod process;
pub mod proxy;
pub mod recording;
pub mod rounds;
pub mod routes;
pub mod runc;
pub mod schema;
pub mod services;
pub mod shim;
pub mod ssh;
pub mod stats;
pub mod suite;
pub mod summary;
pub mod swrk;
pub mod sys;
pub mod sysctl;
pub mod systemd;
pub mod test_dir;
pub mod transfer;
pub mod wait;
pub mod web;
pub mod workspace;
