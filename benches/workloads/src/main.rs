//! `workloads list`, or `workloads NAME TIMES`: prepares a workload and does it so many times.

use std::hint::black_box;
use std::process::ExitCode;

use workloads::{ALL, named};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (name, times) = match words[..] {
        ["list"] => {
            for workload in ALL {
                println!("{} {}", workload.name, workload.times);
            }
            return ExitCode::SUCCESS;
        }
        [name, times] => (name, times.parse::<u32>()),
        _ => {
            eprintln!("error: workloads list, or workloads NAME TIMES");
            return ExitCode::FAILURE;
        }
    };
    match (named(name), times) {
        (Some(workload), Ok(times)) if times <= workload.lasts => {
            let mut run = (workload.prepare)();
            for _ in 0..times {
                black_box(run());
            }
            ExitCode::SUCCESS
        }
        (Some(workload), _) => {
            eprintln!("error: {name} can be done 0 to {} times", workload.lasts);
            ExitCode::FAILURE
        }
        (None, _) => {
            eprintln!("error: no workload is named {name}: see workloads list");
            ExitCode::FAILURE
        }
    }
}
