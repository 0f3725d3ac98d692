#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). Values in CRIU's configuration files.
# Expected: "verbosity 4" asks for level 4 (the manual's form is "option value"), and a value in double quotes may hold
# blanks, as one in the manual's example does.
# Seen: "verbosity N" raises the default by one, whatever N is (level 3 for 1 and for 4); only "verbosity=4" is level 4.
# A quoted directory with a blank deep in its path is refused ("Unsupported configuration file format"), the manual's
# example with it, and CRIU does not start.
# Why it matters: runc.conf and crun.conf are the only way to options that runtimes do not pass on; a debug log that was
# asked for has no debug lines, and directories with blanks cannot be named.
. "$(dirname "$0")/lib/common.bash"
need_root
mkdir -p "$TMP/plain/inner" "$TMP/blank/in ner"
for suite_version in trixie=4.1.1 sid=4.2.1 experimental=4.3; do
    debian "${suite_version%%=*}" "criu=${suite_version#*=}"
done

# Level by the number of lines in the log of `criu check`: the command line says which number belongs to which level.
lines_with() { # SUITE ARGUMENT ...
    local suite=$1
    shift
    rm -f "$TMP/log"
    run_in "$suite" usr/sbin/criu check --no-default-config -o "$TMP/log" "$@" >"$TMP/said" 2>&1 || { echo "refused"; return; }
    if [ -f "$TMP/log" ]; then wc -l <"$TMP/log"; else echo 0; fi
}
level_of() { # SUITE CONFIGURATION-LINE
    echo "$2" >"$TMP/criu.conf"
    local lines
    lines=$(lines_with "$1" --config "$TMP/criu.conf")
    [ "$lines" != refused ] || { echo refused; return; }
    for level in 2 3 4; do
        # Other processes and mounts change a few lines between two runs; the levels lie far apart.
        local reference difference
        reference=$(lines_with "$1" "-v$level")
        [ "$reference" != refused ] || cannot "criu check fails on this kernel"
        difference=$((lines - reference))
        [ "${difference#-}" -gt 20 ] || { echo "level $level"; return; }
    done
    echo "no level"
}
for suite in trixie sid experimental; do
    for line in "verbosity 1" "verbosity 4" "verbosity=4" "work-dir \"$TMP/plain/inner\"" "work-dir \"$TMP/blank/in ner\""; do
        echo "$suite, ${line//$TMP/TMP}: $(level_of "$suite" "$line")"
    done
done >"$TMP/output"
expect_output <<'END'
trixie, verbosity 1: level 3
trixie, verbosity 4: level 3
trixie, verbosity=4: level 4
trixie, work-dir "TMP/plain/inner": level 2
trixie, work-dir "TMP/blank/in ner": refused
sid, verbosity 1: level 3
sid, verbosity 4: level 3
sid, verbosity=4: level 4
sid, work-dir "TMP/plain/inner": level 2
sid, work-dir "TMP/blank/in ner": refused
experimental, verbosity 1: level 3
experimental, verbosity 4: level 3
experimental, verbosity=4: level 4
experimental, work-dir "TMP/plain/inner": level 2
experimental, work-dir "TMP/blank/in ner": refused
END
