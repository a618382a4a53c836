#!/bin/sh
# `make sanitize`: the CPU engine under AddressSanitizer + UndefinedBehaviorSanitizer (every instruction set of this machine, and AMX by tiles that
# are emulated where it has the rest) and, where valgrind is installed, under memcheck (the sets that valgrind knows: AVX2 and portable). Build
# files go to build/sanitize. Fails on the first finding.
set -eu
cd "$(dirname "$0")/../.."
out=build/sanitize
cxx=${CXX:-g++}
rm -rf "$out"
mkdir -p "$out"

avx512="-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq"
compile() { # name, flags...
  name=$1
  shift
  for source in csrc/cpu/*.cpp tests/sanitize/*_driver.cpp; do
    case $(uname -m):$source in
      x86_64:*isa_avx512_bf16.cpp) isa="$avx512 -mavx512bf16" ;;
      # gcc's tile loads are assembly, whose bytes no sanitizer sees
      x86_64:*isa_amx_bf16.cpp) isa="$avx512 -mavx512bf16 -include immintrin.h -include tests/emulate/tiles.h" ;;
      x86_64:*/isa.cpp) isa="-include tests/emulate/has_tiles.h" ;;
      x86_64:*isa_avx512.cpp) isa=$avx512 ;;
      x86_64:*isa_avx2.cpp) isa="-mavx2 -mfma -mf16c" ;;
      *isa_avx*.cpp | *isa_amx*.cpp) continue ;;
      *) isa="" ;;
    esac
    echo "$cxx -std=c++17 -g -Icsrc $* $isa -c $source -o $out/$name-$(basename "$source" .cpp).o"
  done | xargs -P 2 -I {} sh -c '{}'
  "$cxx" "$@" "$out/$name"-*.o -o "$out/$name" -ldl
}

echo "== AddressSanitizer + UndefinedBehaviorSanitizer"
compile asan -O0 -fsanitize=address,undefined -fno-sanitize-recover=all # -O1 takes gcc 12 more than ten minutes on the unrolled AVX-512 tiles
"$out/asan"

if command -v valgrind > /dev/null; then
  echo "== valgrind memcheck"
  compile plain -O2
  valgrind -q --error-exitcode=1 --leak-check=full "$out/plain" small
fi
