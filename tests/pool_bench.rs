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
    let latencies = kinds("latencies");
    let whole: Vec<&str> =
        latencies.iter().map(String::as_str).filter(|kind| !kind.starts_with(' ')).collect();
    let rest = ["primed, at rest", "empty, at rest"];
    let wanted = ["primed shell", "empty shell", rest[0], rest[1], "cellblock restore"];
    assert_eq!(whole, wanted);
    assert_eq!(latencies.len(), wanted.len() + 2 * 4, "the phases of a claim at rest");
    assert_eq!(kinds("sustained"), ["primed, jailed", "primed, without jails"]);
    assert_eq!(report.memory.len(), 4);
    for one in &report.latencies {
        let least = if one.kind.starts_with(' ') { 0 } else { 50 };
        assert!(one.us.count >= 2 && one.us.p50 > least, "{}", one.kind);
        assert!(one.us.p50 <= one.us.p99, "{}", one.kind);
    }
    assert!(report.sustained.iter().all(|one| one.claims_per_second > 0.5));
    for one in &report.memory {
        let beyond = one.pss_kib - one.guest_kib;
        assert!(beyond > 1000 && one.guest_kib < 64 << 10, "{}: {} KiB", one.kind, one.pss_kib);
    }
    let text = report.text();
    assert_eq!(text.lines().count(), 3 + 5 + 8 + 2 * 2 + 4, "{text}");
    eprint!("{text}");
}
