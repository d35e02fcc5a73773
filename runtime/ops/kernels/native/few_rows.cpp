// Products of few rows with a matrix that is read once, as it lies in memory; see few_rows.py.
//
// Up to 4 rows: lanes are neighbours in a row, and each result is a sum over lanes. More: the rows are transposed first,
// lanes are neighbouring rows, and every number of the matrix is multiplied with all of them; sums are taken in parts of
// PART numbers, which are then summed. What a result is made of does not depend on threads or on its neighbours.
// While a tile is multiplied, the tile behind it comes from memory.

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

constexpr int LANES = 8;
constexpr int LINE = 16;             // floats of a line of the caches
constexpr int64_t PART = 512;        // numbers that are summed one after the other
constexpr int64_t PANEL_BYTES = 1 << 17;  // of the matrix, which all rows take before the next one comes

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct Product {
  const float* x;
  int64_t rows, x_stride;
  const float* w;
  int64_t columns, w_stride;
  const float* bias;  // may be null
  float* out;
  int64_t out_stride, inner;
  const float* turned;  // x, transposed in blocks of rows
  int64_t chunk;
  std::atomic<int64_t> next;
};

inline Vec load(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }

inline Vec load_some(const float* at, int64_t count) {
  Vec found = {};
  memcpy(&found, at, count * sizeof(float));
  return found;
}

// The sums of four vectors' lanes.
inline __m128 sums(Vec a, Vec b, Vec c, Vec d) {
  __m256 of_four = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  return _mm_add_ps(_mm256_castps256_ps128(of_four), _mm256_extractf128_ps(of_four, 1));
}

// -- lanes along a row -------------------------------------------------------------------------------------------------

template <int ROWS, int COLUMNS>
inline void along(const Product& p, const float* x, const float* w, int64_t column, bool more) {
  Vec sum[ROWS * COLUMNS] = {};
  int64_t i = 0;
  const float* behind = w + (more ? COLUMNS * p.w_stride : 0);
  if (ROWS == 1) {  // all time goes into reading: the processor sees where to itself, but for where rows begin
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) __builtin_prefetch(behind + c * p.w_stride, 0, 3);
  }
  for (; i + LANES <= p.inner; i += LANES) {
    Vec some[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) some[r] = load(x + r * p.x_stride + i);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) {
      if (ROWS > 1) __builtin_prefetch(behind + c * p.w_stride + i, 0, 2);
      Vec weight = load(w + c * p.w_stride + i);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r * COLUMNS + c] += some[r] * weight;
    }
  }
  if (i < p.inner) {
    for (int c = 0; c < COLUMNS; ++c) {
      Vec weight = load_some(w + c * p.w_stride + i, p.inner - i);
      for (int r = 0; r < ROWS; ++r) sum[r * COLUMNS + c] += load_some(x + r * p.x_stride + i, p.inner - i) * weight;
    }
  }
  float found[(ROWS * COLUMNS + 3) / 4 * 4];
  for (int each = 0; each < ROWS * COLUMNS; each += 4) {
    const Vec none = {};
    auto at = [&](int j) { return each + j < ROWS * COLUMNS ? sum[each + j] : none; };
    _mm_storeu_ps(found + each, sums(at(0), at(1), at(2), at(3)));
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c)
      p.out[r * p.out_stride + column + c] = found[r * COLUMNS + c] + (p.bias ? p.bias[column + c] : 0.0f);
}

template <int ROWS, int COLUMNS>
void all_along(Product& p, int64_t first, int64_t end) {
  int64_t c = first;
  for (; c + COLUMNS <= end; c += COLUMNS)
    along<ROWS, COLUMNS>(p, p.x, p.w + c * p.w_stride, c, c + 2 * COLUMNS <= p.columns);
  for (; c < end; ++c) along<ROWS, 1>(p, p.x, p.w + c * p.w_stride, c, false);
}

// -- lanes across rows -------------------------------------------------------------------------------------------------

template <int BLOCKS, int COLUMNS, bool MORE>
inline void part(Vec (&sum)[COLUMNS][BLOCKS], const float* turned, const float* w, int64_t w_stride, int64_t count) {
  int64_t i = 0;
  for (; i + LINE <= count; i += LINE) {
    if (MORE) {
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; ++c) __builtin_prefetch(w + (COLUMNS + c) * w_stride + i, 0, 2);
    }
#pragma GCC unroll 4
    for (int64_t j = i; j < i + LINE; ++j) {
      Vec some[BLOCKS];
#pragma GCC unroll 8
      for (int b = 0; b < BLOCKS; ++b) some[b] = load(turned + (j * BLOCKS + b) * LANES);
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; ++c) {
        const float weight = w[c * w_stride + j];
#pragma GCC unroll 8
        for (int b = 0; b < BLOCKS; ++b) sum[c][b] += some[b] * weight;
      }
    }
  }
  for (; i < count; ++i)
    for (int c = 0; c < COLUMNS; ++c)
      for (int b = 0; b < BLOCKS; ++b) sum[c][b] += load(turned + (i * BLOCKS + b) * LANES) * w[c * w_stride + i];
}

template <int BLOCKS, int COLUMNS>
void across(const Product& p, int64_t row, int64_t column, bool more) {
  const int64_t rows = p.rows - row < BLOCKS * LANES ? p.rows - row : BLOCKS * LANES;
  const float* turned = p.turned + row * p.inner;
  const float* w = p.w + column * p.w_stride;
  Vec total[COLUMNS][BLOCKS] = {};
  for (int64_t i = 0; i < p.inner; i += PART) {
    Vec sum[COLUMNS][BLOCKS] = {};
    const int64_t count = p.inner - i < PART ? p.inner - i : PART;
    if (more) {
      part<BLOCKS, COLUMNS, true>(sum, turned + i * BLOCKS * LANES, w + i, p.w_stride, count);
    } else {
      part<BLOCKS, COLUMNS, false>(sum, turned + i * BLOCKS * LANES, w + i, p.w_stride, count);
    }
    for (int c = 0; c < COLUMNS; ++c)
      for (int b = 0; b < BLOCKS; ++b) total[c][b] += sum[c][b];
  }
  float found[COLUMNS][BLOCKS * LANES];
  memcpy(found, total, sizeof found);
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < COLUMNS; ++c)
      p.out[(row + r) * p.out_stride + column + c] = found[c][r] + (p.bias ? p.bias[column + c] : 0.0f);
}

template <int BLOCKS, int COLUMNS>
void all_across(Product& p, int64_t first, int64_t end) {
  const int64_t panel = COLUMNS * (1 + PANEL_BYTES / (COLUMNS * p.inner * int64_t(sizeof(float))));
  for (int64_t start = first; start < end; start += panel) {
    const int64_t stop = end - start < panel ? end : start + panel;
    for (int64_t row = 0; row < p.rows; row += BLOCKS * LANES) {
      int64_t c = start;
      for (; c + COLUMNS <= stop; c += COLUMNS)
        across<BLOCKS, COLUMNS>(p, row, c, row == 0 && c + 2 * COLUMNS <= p.columns);
      for (; c < stop; ++c) across<BLOCKS, 1>(p, row, c, false);
    }
  }
}

// An 8 x 8 part of x to `turned`, whose rows are `size` long.
inline void turn_tile(const float* x, int64_t x_stride, int64_t rows, float* turned, int64_t size) {
  __m256 a[LANES], b[LANES];
#pragma GCC unroll 8
  for (int r = 0; r < LANES; ++r) a[r] = r < rows ? _mm256_loadu_ps(x + r * x_stride) : _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int r = 0; r < LANES; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < LANES; r += 4) {
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    _mm256_storeu_ps(turned + r * size, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
    _mm256_storeu_ps(turned + (r + 4) * size, _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
  }
}

// x[row, i] to block row / size, place (i, row % size); rows that fill up the last block are zeros.
void turn(const Product& p, float* turned, int64_t size) {
  for (int64_t row = 0; row < p.rows; row += size, turned += size * p.inner) {
    int64_t i = 0;
    for (; i + LANES <= p.inner; i += LANES)
      for (int64_t r = 0; r < size; r += LANES)
        turn_tile(p.x + (row + r) * p.x_stride + i, p.x_stride, p.rows - row - r, turned + i * size + r, size);
    for (; i < p.inner; ++i)
      for (int64_t r = 0; r < size; ++r)
        turned[i * size + r] = row + r < p.rows ? p.x[(row + r) * p.x_stride + i] : 0.0f;
  }
}

// -- threads -----------------------------------------------------------------------------------------------------------

typedef void Columns(Product&, int64_t, int64_t);

struct Work {
  Product* product;
  Columns* columns;
};

void take_chunks(void* given) {
  Work& work = *static_cast<Work*>(given);
  Product& p = *work.product;
  for (;;) {
    const int64_t start = p.next.fetch_add(p.chunk, std::memory_order_relaxed);
    if (start >= p.columns) return;
    work.columns(p, start, p.columns - start < p.chunk ? p.columns : start + p.chunk);
  }
}

constexpr Columns* ALONG[] = {all_along<1, 4>, all_along<2, 4>, all_along<3, 4>, all_along<4, 3>};

struct Memory {
  float* at = nullptr;
  size_t bytes = 0;
  ~Memory() { free(at); }
  float* of(size_t wanted) {
    if (bytes < wanted) {
      free(at);
      bytes = 0;
      at = static_cast<float*>(aligned_alloc(64, (wanted + 63) / 64 * 64));
      if (at) bytes = wanted;
    }
    return at;
  }
};

thread_local Memory memory;

}  // namespace

extern "C" {

// out[rows, columns] = x[rows, inner] w[columns, inner]^T + bias, strides in numbers. parallel: GOMP_parallel of the
// threads that torch uses, where there are several. 0: done, 1: no memory.
int few_rows(const float* x, int64_t rows, int64_t x_stride, const float* w, int64_t columns, int64_t w_stride,
             const float* bias, float* out, int64_t out_stride, int64_t inner, int threads,
             void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
  Product p{x, rows, x_stride, w, columns, w_stride, bias, out, out_stride, inner, nullptr, columns, {0}};
  Work work{&p, nullptr};
  if (rows <= 4) {
    work.columns = ALONG[rows - 1];
  } else {
    const int64_t by_two = (rows + 2 * LANES - 1) / (2 * LANES) * 2, by_three = (rows + 3 * LANES - 1) / (3 * LANES) * 3;
    const int64_t blocks = rows <= LANES ? 1 : by_two <= by_three ? 2 : 3, size = blocks * LANES;
    float* turned = memory.of(size_t((rows + size - 1) / size * size) * inner * sizeof(float));
    if (!turned) return 1;
    turn(p, turned, size);
    p.turned = turned;
    work.columns = blocks == 1 ? all_across<1, 6> : blocks == 2 ? all_across<2, 6> : all_across<3, 4>;
  }
  if (threads > 1) {
    // whole tiles of every kind, several for each thread
    constexpr int64_t TILES = 24;
    p.chunk = (columns / (4 * threads) / TILES + 1) * TILES;
    parallel(take_chunks, &work, unsigned(threads), 0);
  } else {
    work.columns(p, 0, columns);
  }
  return 0;
}

}  // extern "C"
