// AMX: tdpbsud multiplies 8 outputs x 16 kept blocks (signed) by 16 kept units x 16 tokens (unsigned, offset 128).
//
//   sums         [8 outputs][16 tokens] int32       <- as the group's sums lie
//   weights      [8 outputs][16 blocks] units       <- 16 blocks of 8 units, turned once for all tokens
//   activations  [16 blocks][16 tokens] units       <- the kept units' rows, copied: 64 bytes each
//
// 1. Two words of the bitmap at a time, all block rows of the group: their activations stay in the first-level cache.
// 2. A block row's kept blocks wait until there are enough of them to be worth loading and storing its sums, so that
//    only the last 16 of all are padded, with weights of zero.
// 3. A chunk of 16 blocks is copied before the chunk that was copied kLag chunks ago is multiplied: a tile load waits
//    until the stores it reads have left the store buffer.
//
// Block rows of 1, floats, few tokens and block rows with few kept blocks: AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,popcnt,amx-tile,amx-int8")

#include <immintrin.h>

#include "sparse_linear.h"
#include "sparse_tile.h"
#include "transpose_units_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kChunk = 16;        // blocks
constexpr int kVectors = 4;       // of tokens, at most
constexpr int kLag = 1;           // chunks
constexpr int kPassWords = 2;     // 32 KB of activations at 64 tokens
constexpr int kWorthBlocks = 64;  // kept blocks that are worth a pass over a block row's sums
constexpr int kFewBlocks = 80;    // of a block row: fewer go to AVX-512
constexpr int kRows = kGroup / kMaxBlockRows;
constexpr int kWaiting = kWorthBlocks + kPassWords * kWordUnits;
constexpr int kRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  // Sums 0 … 3, weights 4, activations 5 … 7.
  constexpr TileConfig() {
    for (int t = 0; t < 8; ++t) {
      bytes_per_row[t] = kRowBytes;
      rows[t] = t <= 4 ? kMaxBlockRows : kChunk;
    }
  }
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig kTiles;

// [16 blocks][8] -> [8][16 blocks]
inline void turn_blocks(const uint32_t* in, uint32_t* out) {
  const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
  // By four blocks: units 0 … 3 and 4 … 7, four blocks in each 128 bits.
  __m512i four[2][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_loadu_si512(in + i * 32), b = _mm512_loadu_si512(in + i * 32 + 16);
    four[0][i] = _mm512_permutex2var_epi32(a, low, b);
    four[1][i] = _mm512_permutex2var_epi32(a, high, b);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i* f = four[half];
    const __m512i a = _mm512_shuffle_i32x4(f[0], f[1], 0x88), b = _mm512_shuffle_i32x4(f[2], f[3], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(f[0], f[1], 0xdd), d = _mm512_shuffle_i32x4(f[2], f[3], 0xdd);
    uint32_t* row = out + half * 4 * kChunk;
    _mm512_store_si512(row, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(row + kChunk, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_store_si512(row + 2 * kChunk, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_store_si512(row + 3 * kChunk, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}

struct Chunk {
  alignas(64) uint32_t a[kChunk * kVectors * kLanes];
  alignas(64) uint32_t weights[kMaxBlockRows * kChunk];
  int row;
};

// Tile numbers are part of the instruction.
template <int kTileVectors>
struct Multiplier {
  static constexpr int kTokens = kTileVectors * kLanes, kStride = kTokens * kUnitBytes;
  const SparseTileArgs& args;
  Chunk chunks[kLag + 1];
  int filled = 0, multiplied = 0;
  int row = -1;  // whose sums are in the tiles

  explicit Multiplier(const SparseTileArgs& a) : args(a) {}

  void load_sums() {
    const uint32_t* acc = args.acc + row * kMaxBlockRows * kTokens;
    _tile_loadd(0, acc, kStride);
    if constexpr (kTileVectors > 1) _tile_loadd(1, acc + kLanes, kStride);
    if constexpr (kTileVectors > 2) _tile_loadd(2, acc + 2 * kLanes, kStride);
    if constexpr (kTileVectors > 3) _tile_loadd(3, acc + 3 * kLanes, kStride);
  }

  void store_sums() {
    uint32_t* acc = args.acc + row * kMaxBlockRows * kTokens;
    _tile_stored(0, acc, kStride);
    if constexpr (kTileVectors > 1) _tile_stored(1, acc + kLanes, kStride);
    if constexpr (kTileVectors > 2) _tile_stored(2, acc + 2 * kLanes, kStride);
    if constexpr (kTileVectors > 3) _tile_stored(3, acc + 3 * kLanes, kStride);
  }

  void fill(int of_row, const uint32_t* positions, const uint32_t* values, int count) {
    Chunk& chunk = chunks[filled++ % (kLag + 1)];
    chunk.row = of_row;
#pragma GCC unroll 16
    for (int q = 0; q < kChunk; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v)
        _mm512_store_si512(chunk.a + q * kTokens + v * kLanes, _mm512_loadu_si512(args.a + positions[q] + v * kLanes));
    uint32_t padded[kChunk * kMaxBlockRows];
    if (count < kChunk) {
      for (int i = 0; i < kChunk * kMaxBlockRows; ++i) padded[i] = i < count * kMaxBlockRows ? values[i] : 0;
      values = padded;
    }
    turn_blocks(values, chunk.weights);
  }

  void multiply() {
    const Chunk& chunk = chunks[multiplied++ % (kLag + 1)];
    if (chunk.row != row) {
      if (row >= 0) store_sums();
      row = chunk.row;
      load_sums();
    }
    _tile_loadd(4, chunk.weights, kRowBytes);
    _tile_loadd(5, chunk.a, kStride);
    _tile_dpbsud(0, 4, 5);
    if constexpr (kTileVectors > 1) {
      _tile_loadd(6, chunk.a + kLanes, kStride);
      _tile_dpbsud(1, 4, 6);
    }
    if constexpr (kTileVectors > 2) {
      _tile_loadd(7, chunk.a + 2 * kLanes, kStride);
      _tile_dpbsud(2, 4, 7);
    }
    if constexpr (kTileVectors > 3) {
      _tile_loadd(5, chunk.a + 3 * kLanes, kStride);
      _tile_dpbsud(3, 4, 5);
    }
  }

  void add(int of_row, const uint32_t* positions, const uint32_t* values, int count) {
    fill(of_row, positions, values, count);
    if (filled > multiplied + kLag) multiply();
  }

  void finish() {
    while (multiplied < filled) multiply();
    if (row >= 0) store_sums();
  }
};

// Where the kept blocks of words [word, end) of a block row begin in the activations; returns their number.
template <int kTokens>
inline int list_blocks(const SparseTileArgs& args, int row, int64_t word, int64_t end, uint32_t at,
                       uint32_t* positions) {
  int count = 0;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; word < end; ++word) {
    const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
    uint64_t bits =
        kept_bits(args.bitmap[row * args.word_stride + word], allowed, at + static_cast<uint32_t>(count), args.blocks);
#pragma GCC unroll 4
    for (int part = 0; part < kWordUnits / kLanes; ++part, bits >>= kLanes) {
      const __mmask16 kept = static_cast<__mmask16>(bits);
      const __m512i unit =
          _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(word * kWordUnits + part * kLanes)));
      _mm512_storeu_si512(positions + count,
                          _mm512_maskz_compress_epi32(kept, _mm512_mullo_epi32(unit, _mm512_set1_epi32(kTokens))));
      count += __builtin_popcount(kept);
    }
  }
  return count;
}

template <int kTileVectors>
void tile(const SparseTileArgs& args) {
  using M = Multiplier<kTileVectors>;
  _tile_loadconfig(&kTiles);
  M multiplier(args);
  uint32_t positions[kRows][kWaiting + kChunk];
  int waiting[kRows] = {};
  for (int64_t word = 0; word < args.words; word += kPassWords) {
    const int64_t end = smaller(word + kPassWords, args.words);
    for (int row = 0; row < args.rows; ++row) {
      uint32_t* list = positions[row];
      int count = waiting[row];
      count +=
          list_blocks<M::kTokens>(args, row, word, end, args.cursor[row] + static_cast<uint32_t>(count), list + count);
      const bool last = end == args.words;
      int done = 0;
      if (count >= kWorthBlocks || last) {
        for (; done + kChunk <= count; done += kChunk)
          multiplier.add(
              row, list + done,
              args.values + static_cast<int64_t>(args.cursor[row] + static_cast<uint32_t>(done)) * kMaxBlockRows,
              kChunk);
        if (last && done < count) {  // any unit will do where the weights are zero
          for (int i = count; i < done + kChunk; ++i) list[i] = 0;
          multiplier.add(
              row, list + done,
              args.values + static_cast<int64_t>(args.cursor[row] + static_cast<uint32_t>(done)) * kMaxBlockRows,
              count - done);
          done = count;
        }
        args.cursor[row] += static_cast<uint32_t>(done);
        for (int i = done; i < count; ++i) list[i - done] = list[i];
      }
      waiting[row] = count - done;
    }
  }
  multiplier.finish();
  _tile_release();
}

// The rest is the path's that has AVX-512 alone.
constexpr const SparseLinearPath& kRest = kSparseLinearAvx512Vnni;

// With few kept blocks in a block row its last, padded chunk and its sums' way in and out cost more than the tiles
// save.
bool few_blocks(const SparseTileArgs& args) {
  int64_t kept = 0;
  for (int row = 0; row < args.rows; ++row)
    for (int64_t word = 0; word < args.words; ++word)
      kept += __builtin_popcountll(args.bitmap[row * args.word_stride + word]);
  return kept < kFewBlocks * args.rows;
}

void tile_eight_amx(const SparseTileArgs& args) {
  if (few_blocks(args)) {
    SparseTileArgs part = args;
    for (int64_t word = 0; word < args.words; word += kMaxBlockWords) {
      part.a = args.a + word * kWordUnits * args.vectors * kLanes;
      part.bitmap = args.bitmap + word;
      part.words = smaller(args.words - word, kMaxBlockWords);
      part.last_word = word + part.words == args.words ? args.last_word : ~0ULL;
      kRest.unsigned_int8.tile[1](part);
    }
    return;
  }
  constexpr SparseTile kByVectors[kVectors] = {tile<1>, tile<2>, tile<3>, tile<4>};
  kByVectors[args.vectors - 1](args);
}

template <SparseKernels SparseLinearPath::* kKernels, int kKind>
void tile_of_rest(const SparseTileArgs& args) {
  (kRest.*kKernels).tile[kKind](args);
}

template <SparseKernels SparseLinearPath::* kKernels, int kKind>
void decode_of_rest(const SparseDecodeArgs& args) {
  (kRest.*kKernels).decode[kKind](args);
}

constexpr SparseKernels SparseLinearPath::* kBytes = &SparseLinearPath::unsigned_int8;
constexpr SparseKernels SparseLinearPath::* kFloats = &SparseLinearPath::floats;

constexpr SparseKernels kInt8 = {
    {tile_of_rest<kBytes, 0>, tile_eight_amx}, {decode_of_rest<kBytes, 0>, decode_of_rest<kBytes, 1>}, true};

void to_float(const void* x, DType dtype, int64_t k, float* out) { kRest.to_float(x, dtype, k, out); }

auto epilogue(Activation activation, DType dtype) { return kRest.epilogue(activation, dtype); }

auto float_epilogue(Activation activation, DType dtype) { return kRest.float_epilogue(activation, dtype); }

}  // namespace

const SparseLinearPath kSparseLinearAmx = {
    kLanes,
    kVectors,
    0x80,
    quantize_row_avx512,
    to_float,
    transpose_units,
    kInt8,
    kInt8,
    {{tile_of_rest<kFloats, 0>, tile_of_rest<kFloats, 1>}, {decode_of_rest<kFloats, 0>, decode_of_rest<kFloats, 1>}},
    kRest.int4,  // a constant, so that it is there before this is made
    epilogue,
    float_epilogue};

}  // namespace tcompress::cpu

#endif  // __x86_64__
