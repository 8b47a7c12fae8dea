//! The benchmark of pools, in short: that it measures, and says what it has measured.

#[path = "../benches/pool/measure.rs"]
mod measure;

#[test]
fn it_measures_every_kind() {
    let report = measure::run(&measure::SMOKE);
    let json: serde_json::Value = serde_json::from_str(&report.json()).expect("JSON");
    let kinds = |list: &str| {
        let rows = json[list].as_array().expect("rows");
        rows.iter().map(|row| row["kind"].as_str().expect("kind").to_string()).collect::<Vec<_>>()
    };
    assert_eq!(kinds("latencies"), ["primed shell", "empty shell", "cellblock restore"]);
    assert_eq!(kinds("sustained"), ["primed, jailed", "primed, without jails"]);
    assert_eq!(report.memory.len(), 4);
    for one in &report.latencies {
        assert!(one.us.count >= 2 && one.us.p50 > 50 && one.us.p50 <= one.us.p99, "{}", one.kind);
    }
    assert!(report.sustained.iter().all(|one| one.claims_per_second > 0.5));
    for one in &report.memory {
        let beyond = one.pss_kib - one.guest_kib;
        assert!(beyond > 1000 && one.guest_kib < 64 << 10, "{}: {} KiB", one.kind, one.pss_kib);
    }
    let text = report.text();
    assert_eq!(text.lines().count(), 3 + 3 + 2 * 2 + 4, "{text}");
    eprint!("{text}");
}
