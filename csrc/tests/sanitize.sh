#!/usr/bin/env bash
# Runs the runtime under GCC's sanitizers: what is right must pass, and what is seeded must be found.
# One line a check; exits 1 on any surprise. CXX chooses the compiler.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
surprises=0

# ThreadSanitizer of GCC 12 gives up where the kernel randomises addresses by more than 28 bits.
fixed=""
setarch -R true 2>/dev/null && fixed="setarch -R"

verdict() {  # verdict WHAT STATUS: 0 is as expected
    if [ "$2" -eq 0 ]; then echo "ok        $1"; return; fi
    echo "SURPRISE  $1"
    head -n 40 "$room/output" 2>/dev/null | sed 's/^/          | /'
    surprises=1
}

build() {  # build NAME FLAG...
    local name=$1; shift
    "${CXX:-g++}" -std=c++20 -g -Wall -Wextra -Wpedantic -Werror -fopenmp "$@" \
        "$here/race.cpp" "$here/../runtime/gate.cpp" -o "$room/$name" >"$room/output" 2>&1
    verdict "builds: $name ($*)" $?
}

# The whole runtime: every source but the Python binding. One object a file, for kernels have flags of their own.
build_all() {  # build_all NAME FLAG...
    local name=$1 kernels=""; shift
    case $(uname -m) in
        x86_64) kernels="baseline v3 v4" ;;
        aarch64 | arm64) kernels="neon" ;;
    esac
    mkdir "$room/$name.o"
    for file in "$here"/ensemble.cpp "$here"/../runtime/*.cpp "$here"/../layers/*.cpp "$here"/../kernels/dispatch.cpp \
        $(for kernel in $kernels; do echo "$here/../kernels/$kernel.cpp"; done); do
        case $file in *kernels/v[34].cpp) march="-march=x86-64-$(basename "$file" .cpp)" ;; *) march="" ;; esac
        object="$room/$name.o/$(basename "$(dirname "$file")")-$(basename "$file" .cpp).o"
        echo "-std=c++20 -g -Wall -Wextra -Werror -fopenmp $* $march -c $file -o $object"
    done | xargs -P "$(nproc)" -I{} sh -c "${CXX:-g++} {}" >"$room/output" 2>&1 &&
        "${CXX:-g++}" -fopenmp "$@" "$room/$name.o"/*.o -o "$room/$name" >>"$room/output" 2>&1
    verdict "builds: $name ($*)" $?
}

run() { timeout 120 $fixed "$@" >"$room/output" 2>&1; }

clean() {  # clean NAME
    run "$room/$1" && ! grep -q Sanitizer "$room/output"
    verdict "no report, right results: $1" $?
}

reported() {  # reported NAME FAULT: the exit status must tell as well
    ! run "$room/$1" --seed-fault "$2" && grep -q "WARNING: ThreadSanitizer: data race" "$room/output"
    verdict "reported: $1 --seed-fault $2" $?
}

build thread -O1 -fsanitize=thread
clean thread
reported thread missing-barrier
reported thread early-reuse

build_all ensemble-thread -O1 -fsanitize=thread
clean ensemble-thread
reported ensemble-thread missing-barrier
reported ensemble-thread missing-wait

build thread-portable -O1 -fsanitize=thread -DPARAXIS_PORTABLE_SLEEP
clean thread-portable

build address -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
clean address

build_all ensemble-address -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
clean ensemble-address

OMP_THREAD_LIMIT=3 run "$room/address"
[ $? -eq 1 ] && grep -q "OpenMP gave 3 of 4 threads" "$room/output"
verdict "refused: 4 ranks on 3 threads" $?

exit $surprises
