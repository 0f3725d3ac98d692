//! The command line as people see it: options under headings, short lines for `-h`, what stands at the end.

use clap::{Arg, Command};

/// Options by the role that they have, with the heading over them.
const HEADINGS: &[(&str, &[&str])] = &[
    (
        "Migration",
        &[
            "pid", "mode", "tcp", "address", "route", "id", "resume", "track", "watch",
        ],
    ),
    (
        "Container",
        &[
            "container",
            "runtime",
            "runtime_root",
            "bundle",
            "bundles",
            "base",
            "image",
            "image_id",
            "pause",
            "stateless",
            "ready",
            "drain",
            "name",
            "leave_running",
            "files",
            "layers",
            "volume",
            "preload",
            "output_log",
        ],
    ),
    (
        "Limits",
        &[
            "max_downtime",
            "max_rounds",
            "on_missed",
            "throttle",
            "timeout",
            "round_rate",
            "wait",
        ],
    ),
    (
        "Log",
        &["log", "order", "order_wait", "file_bytes", "replay"],
    ),
    (
        "Replay",
        &[
            "verify", "follow", "on_lag", "max_lag", "source", "stall", "service", "at", "start",
            "snapshot", "hold",
        ],
    ),
    (
        "Rules",
        &["rules", "state", "interval", "socket", "dry_run", "check"],
    ),
    (
        "Commands",
        &[
            "digest",
            "pre_freeze",
            "post_resume",
            "on_failure",
            "hook_limit",
            "probe",
        ],
    ),
    (
        "Network",
        &["to", "listen", "port_file", "serve_on", "insecure", "rsh"],
    ),
    (
        "Directories",
        &[
            "dir",
            "state_dir",
            "output",
            "upper",
            "lower",
            "merged",
            "rootfs",
        ],
    ),
    ("Programs", &["criu", "bin_dir", "without_lz4"]),
    ("Images", &["lazy", "memory_only", "no_read", "compress"]),
    ("Reports", &["report", "events", "json", "svg", "verbose"]),
];

/// Options whose text is too long for one line: what `-h` says of them.
const SHORT: &[(&str, &str)] = &[
    (
        "on_missed",
        "What to do when rounds end and --max-downtime cannot be met",
    ),
    (
        "throttle",
        "Slow the processes if rounds do not get smaller [default: never]",
    ),
    (
        "tcp",
        "What to do with established TCP connections [default: refuse]",
    ),
    ("address", "An address that moves with the processes"),
    (
        "drain",
        "How long connections may continue here after the switch: 30, 2m; 0 cuts them",
    ),
    (
        "route",
        "A route to switch to the destination: address:, nft:, haproxy: or exec:",
    ),
    (
        "probe",
        "Probe the service until it answers, and report when that was",
    ),
    (
        "runtime_root",
        "Directory of the runtime's state [default: the runtime's own]",
    ),
    ("bundle", "The container's bundle at the destination"),
    ("bundles", "Containers' bundles are DIR/NAME here"),
    (
        "serve_on",
        "The address at which the destination fetches memory from this host",
    ),
    ("insecure", "Listen on a network without TLS"),
    ("preload", "Send the files ahead, and move nothing"),
    (
        "layers",
        "Whether to keep the layers of a root file system that is an overlay",
    ),
    (
        "volume",
        "A directory that moves too, to DST or to the same path",
    ),
    (
        "output_log",
        "The log of the container's output, continued at the destination as THERE",
    ),
    (
        "events",
        "Append what happens to FILE, a line of JSON for each event",
    ),
    ("base", "The image that the container was made of"),
    (
        "image",
        "The image from which podman creates the container when it imports the archive",
    ),
];

/// Exit codes of the commands that do something.
const EXITS: &str = "\
Exit codes:
  0  done
  1  it failed; the error says why, and what to do
  2  the command line is wrong";

/// What stands at the end of each command's `--help`.
const ENDS: &[(&str, &str)] = &[
    (
        "agent",
        "\
Signals:
  SIGTERM, SIGINT  end the agent once no migration needs it; the next start finishes what is incomplete

Examples:
  pageferry agent --listen 0.0.0.0:9191 --tls
  pageferry agent --listen unix:/run/pageferry.sock",
    ),
    (
        "migrate",
        "\
Signals:
  SIGTERM, SIGINT  abort if that is still possible: the processes continue here

If migrate is killed, a second process finishes or aborts the migration; see --resume.

Examples:
  pageferry migrate --pid 1234 --to host:9191 --tls
  pageferry migrate --pid 1234 --to host:9191 --tls --mode hybrid --max-downtime 300ms
  pageferry migrate --container web --to host:9191 --tls --stateless --mode live --ready tcp:8080 \\
    --route 'nft:inet/nat/services/80=10.0.0.1:8080->10.0.0.2:8080'
  pageferry migrate --container c1 --volume /srv/c1 --to host:9191 --tls --preload",
    ),
    (
        "plan",
        "\
Exit codes:
  0  it can be moved
  1  it cannot be moved; each reason is printed
  2  the command line is wrong

Examples:
  pageferry plan --pid 1234 --to host:9191 --tls",
    ),
    ("finish", "Examples:\n  pageferry finish images && criu restore -D images"),
    (
        "split",
        "\
Examples:
  pageferry split images -o lazy
  page-server -d -D lazy --lazy-pages --port 27000",
    ),
    (
        "inspect",
        "\
Exit codes:
  0  printed
  1  the parents or a directory cannot be read
  2  the command line is wrong, or DIR holds no images

Examples:
  pageferry inspect images
  pageferry inspect images --json | jq .totals",
    ),
    (
        "verify",
        "\
Exit codes:
  0  good: no fault, maybe remarks
  1  at least one fault: a restore fails, or what it restores is wrong
  2  the command line is wrong, or DIR holds no images

Examples:
  pageferry verify images
  pageferry verify images --lazy --criu 4.1.1
  pageferry verify received --memory-only",
    ),
    (
        "doctor",
        "\
Exit codes:
  0  everything works here
  1  something does not work
  2  the command line is wrong

Examples:
  pageferry doctor
  pageferry doctor --json | jq '.checks[] | select(.state != \"works\")'",
    ),
    (
        "export",
        "\
Signals:
  SIGTERM, SIGINT  end the export; a paused container continues

Examples:
  pageferry export c1 -o image --pause
  pageferry export c1 -o image --base base:latest
  skopeo copy oci:image:template containers-storage:c1",
    ),
    (
        "record",
        "\
Signals:
  SIGTERM, SIGINT  close the connections in order, and complete the log

Examples:
  pageferry record --listen 0.0.0.0:6379 --to 127.0.0.1:6380 --log log
  pageferry record --listen :::6379 --to 127.0.0.1:6380 --log log --digest 'redis-cli -p $PAGEFERRY_PORT debug digest'",
    ),
    (
        "replay",
        "\
Exit codes:
  0  everything was replayed, and nothing that was compared differs
  1  an answer or a digest differs or is missing; the error names the first
  2  the command line is wrong

Examples:
  pageferry replay --log log --to 127.0.0.1:6380 --verify
  pageferry replay --log log --to host:6379 --follow --on-lag pause-clients
  pageferry replay --log appendonly.aof --replay 'redis-cli -h host --pipe'",
    ),
    (
        "watch",
        "\
Signals:
  SIGHUP           reload the rules; if they have an error, the old ones stay
  SIGTERM, SIGINT  end the watcher; running actions continue

Examples:
  pageferry watch --rules rules.toml --dry-run
  pageferry watch --rules rules.toml --socket /run/pageferry-watch.sock",
    ),
    (
        "dump",
        "\
Signals:
  SIGTERM, SIGINT  abort: the container continues, and no archive is left

Examples:
  pageferry dump c1 -o c1.tar.zst
  checkpointctl inspect c1.tar.zst",
    ),
    (
        "restore",
        "\
Examples:
  pageferry restore c1.tar.zst --bundle bundle",
    ),
    (
        "snapshot",
        "\
Signals:
  SIGTERM, SIGINT  abort: the processes continue, and no images are left

Examples:
  pageferry snapshot c1 -o images --leave-running
  pageferry snapshot --pid 1234 -o images && criu restore -d -D images",
    ),
    (
        "copy-lazy",
        "\
Signals:
  SIGTERM, SIGINT  abort; nothing is left at the destination

Examples:
  pageferry copy-lazy images host:images
  pageferry copy-lazy --rsh 'ssh -p 2222' images host:images",
    ),
    (
        "working-set",
        "\
Examples:
  pageferry working-set images/working-set.img
  pageferry working-set monday tuesday -o images/working-set.img",
    ),
];

/// The definition with headings, short lines and ends of help.
pub(crate) fn with_help(command: Command) -> Command {
    let command = command.mut_args(argument);
    command.mut_subcommands(|command| {
        let name = command.get_name().to_owned();
        let end = ENDS
            .iter()
            .find(|(of, _)| *of == name)
            .map_or("", |end| end.1);
        let end = match end.contains("Exit codes:") {
            true => end.to_owned(),
            false => format!("{EXITS}\n\n{end}"),
        };
        command.mut_args(argument).after_long_help(end)
    })
}

fn argument(arg: Arg) -> Arg {
    let id = arg.get_id().as_str().to_owned();
    let heading = HEADINGS.iter().find(|(_, ids)| ids.contains(&id.as_str()));
    let arg = match heading {
        Some((heading, _)) if arg.get_long().is_some() => arg.help_heading(*heading),
        _ => arg,
    };
    let short = SHORT.iter().find(|(of, _)| *of == id).map(|short| short.1);
    match (short, arg.get_help().cloned(), arg.get_long_help()) {
        (Some(short), Some(long), None) => arg.help(short).long_help(long),
        _ => arg,
    }
}
