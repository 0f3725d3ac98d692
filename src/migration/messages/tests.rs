use super::*;

#[test]
fn faults_are_sorted_into_parts_of_equal_length() {
    assert_eq!(FaultTimes::of(&[]), FaultTimes::default());
    let one = FaultTimes::of(&[(0, 7)]);
    assert_eq!(
        (one.blocked_us, one.parts.len(), one.parts[0].count),
        (7, 1, 1)
    );
    let faults: Vec<(u64, u64)> = (0..10_000).map(|at| (at, 2)).collect();
    let many = FaultTimes::of(&faults);
    assert!(many.parts.len() as u64 <= FAULT_PARTS_MAX);
    let (count, waited) = many.parts.iter().fold((0, 0), |(count, waited), part| {
        (count + part.count, waited + part.waited_us)
    });
    assert_eq!((count, waited, many.blocked_us), (10_000, 20_000, 20_000));
}

#[test]
fn addresses_that_no_interface_has_are_refused() {
    let of = |address: &str, prefix, device: &str| {
        let address = address.parse().unwrap();
        let device = device.to_owned();
        ServiceAddress {
            address,
            prefix,
            device,
        }
        .is_possible()
    };
    assert!(of("10.0.0.5", 24, "eth0") && of("fd00::5", 64, "br-lan.7"));
    assert!(!of("10.0.0.5", 33, "eth0") && !of("fd00::5", 129, "eth0"));
    for device in ["", "-d", "..", "a/b", "a b", "sixteen-letters-"] {
        assert!(!of("10.0.0.5", 24, device), "{device:?}");
    }
    assert!(!of("0.0.0.0", 0, "eth0") && !of("224.0.0.1", 4, "eth0"));
}

#[test]
fn a_migration_with_numbers_out_of_range_is_refused() {
    let begin = |pids: Vec<u32>, timeout_s| Begin {
        id: "m-1".parse().unwrap(),
        mode: Mode::PreCopy,
        pids,
        memory_bytes: u64::MAX,
        tcp: TcpConnections::Refuse,
        timeout_s,
        container: None,
        addresses: Vec::new(),
        files: Vec::new(),
        keeps_files: false,
        outputs: Vec::new(),
    };
    assert_eq!(begin(vec![1], TIMEOUT_S_MAX).check(), Ok(()));
    for timeout_s in [TIMEOUT_S_MAX + 1, u64::MAX] {
        let refused = begin(vec![1], timeout_s).check();
        assert_eq!(refused, Err(BadBegin::Timeout(timeout_s)));
    }
    assert_eq!(begin(vec![0], 1).check(), Err(BadBegin::PidZero));
    assert_eq!(begin(Vec::new(), 1).check(), Err(BadBegin::Pids(0)));
    let many = MIGRATION_PIDS_MAX + 1;
    assert_eq!(begin(vec![1; many], 1).check(), Err(BadBegin::Pids(many)));
}

#[test]
fn versions_are_compared_by_number() {
    let of = |text: &str| CriuVersion::parse(&format!("Version: {text}\nGitID: v1\n")).unwrap();
    assert_eq!(of("4.2.1"), CriuVersion([4, 2, 1]));
    assert_eq!(of("4.3"), CriuVersion([4, 3, 0]));
    assert_eq!(of("4.10-rc1"), CriuVersion([4, 10, 0]));
    assert!(of("4.3") > of("4.2.1") && of("4.10") > of("4.9.9"));
    assert_eq!((of("4.1.1").wire(), of("4.2").wire()), (Wire::V1, Wire::V2));
    assert_eq!(of("4.3").to_string(), "4.3");
    assert_eq!(CriuVersion::parse("criu 4"), None);
    assert_eq!(CriuVersion::parse("Version: x"), None);
}
