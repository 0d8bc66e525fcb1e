/* The CPU's packing, each pass in one: the same numbers as the vectorised torch of packing.py, bits.py and values.py,
 * which are the specification (tests compare them bit by bit). Built and called by cpu_kernels.py.
 *
 * Selection is handled W columns at a time, so that what a pass needs stays in the first-level cache. Low bits are
 * handled in rows as long as can be: memory that is read and written in order arrives several times sooner. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define W 256
#define LONGEST 4096 /* columns that are handled side by side */
#define BLOCK 128
#define MOST_KEPT 64
#define INLINE static inline __attribute__((always_inline))
#define PARALLEL _Pragma("omp parallel for schedule(static)")

typedef int64_t i64;
typedef int32_t i32;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum { F32 = 0, BF16 = 1 };

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

INLINE float as_float(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

INLINE u32 as_bits(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}

INLINE u16 to_bf16(float f) {
  u32 bits = as_bits(f);
  u32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (u16)rounded;
}

/* Codes (bits.py): pieces of 8, 4, 2 and 1 bits from the lowest bits up; the codes of a byte stand a stretch apart. */

/* A piece of each of `count` bytes: ((from >> down) & mask) << up, or-ed to what is in `to`. Eight bytes at a time: what a
 * shift brings over from the neighbour is masked, since a piece lies within its byte before and after. */
INLINE void move_pieces(const u8 *from, i64 count, int down, int mask, int up, u8 *to) {
  u64 masks = (u64)mask * 0x0101010101010101u;
  i64 i = 0;
  for (; i + 8 <= count; i += 8) {
    u64 some, there;
    memcpy(&some, from + i, 8);
    memcpy(&there, to + i, 8);
    there |= ((some >> down) & masks) << up;
    memcpy(to + i, &there, 8);
  }
  for (; i < count; i++) to[i] |= (u8)(((from[i] >> down) & mask) << up);
}

/* codes from ... to of n codes of `width` bits, at most 8. */
INLINE void decode_bytes(const u8 *packed, i64 n, int width, i64 from, i64 to, u8 *out) {
  int shift = 0;
  memset(out, 0, (size_t)(to - from));
  for (int piece = 8; piece; piece >>= 1)
    for (; width >= piece; width -= piece, shift += piece) {
      i64 lanes = 8 / piece, stretch = (n + lanes - 1) / lanes;
      for (i64 i = from; i < to;) {
        i64 lane = i / stretch, end = least(to, (lane + 1) * stretch);
        move_pieces(packed + i - lane * stretch, end - i, (int)lane * piece, (1 << piece) - 1, shift, out + i - from);
        i = end;
      }
      packed += (n * piece + 7) / 8;
    }
}

/* The same of codes of any width. */
INLINE void decode_range(const u8 *packed, i64 n, int width, i64 from, i64 to, i32 *out) {
  int shift = 0;
  for (i64 i = from; i < to; i++) out[i - from] = 0;
  for (int piece = 8; piece; piece >>= 1)
    for (; width >= piece; width -= piece, shift += piece) {
      i64 lanes = 8 / piece, stretch = (n + lanes - 1) / lanes;
      for (i64 i = from; i < to;) {
        i64 lane = i / stretch, end = least(to, (lane + 1) * stretch);
        int down = (int)lane * piece, mask = (1 << piece) - 1;
        const u8 *part = packed - lane * stretch;
        for (i64 j = i; j < end; j++) out[j - from] |= ((part[j] >> down) & mask) << shift;
        i = end;
      }
      packed += (n * piece + 7) / 8;
    }
}

/* n codes of `width` bits into `out`, a stretch of bytes at a time: ADD(first, count, shift, mask, up, sum) ors a piece of
 * codes first ... first + count, moved up by `up`, to the bytes of `sum`. */
#define ENCODE_PIECES(n, width, out, ADD)                                       \
  do {                                                                          \
    int left = (width), shift = 0;                                              \
    u8 *plane = (out);                                                          \
    for (int piece = 8; piece; piece >>= 1)                                     \
      for (; left >= piece; left -= piece, shift += piece) {                    \
        i64 lanes = 8 / piece, stretch = ((n) + lanes - 1) / lanes;             \
        i64 bytes = ((n) * piece + 7) / 8;                                      \
        int mask = (1 << piece) - 1;                                            \
        PARALLEL for (i64 at = 0; at < bytes; at += W) {                        \
          u8 sum[W] = {0};                                                      \
          i64 here = least(W, bytes - at);                                      \
          for (i64 lane = 0; lane < lanes; lane++) {                            \
            i64 first = lane * stretch + at, count = least(here, (n) - first);  \
            if (count <= 0) break;                                              \
            ADD(first, count, shift, mask, (int)lane * piece, sum);             \
          }                                                                     \
          memcpy(plane + at, sum, (size_t)here);                                \
        }                                                                       \
        plane += bytes;                                                         \
      }                                                                         \
  } while (0)

void br_pack_bytes(const u8 *codes, i64 n, int width, u8 *out) {
#define ADD_BYTES(first, count, shift, mask, up, sum) move_pieces(codes + (first), count, shift, mask, up, sum)
  ENCODE_PIECES(n, width, out, ADD_BYTES);
}

static void pack_ranks(const i32 *ranks, i64 n, int width, u8 *out) {
#define ADD_INTS(first, count, shift, mask, up, sum) \
  for (i64 i = 0; i < (count); i++) sum[i] |= (u8)(((ranks[(first) + i] >> (shift)) & (mask)) << (up))
  ENCODE_PIECES(n, width, out, ADD_INTS);
}

void br_unpack_bytes(const u8 *packed, i64 n, int width, u8 *out) {
  PARALLEL for (i64 at = 0; at < n; at += LONGEST) decode_bytes(packed, n, width, at, least(n, at + LONGEST), out + at);
}

/* code = first + sum of steps[j] over the points[j] that x exceeds (coded.py). */
void br_code(const float *x, i64 n, const float *points, const i32 *steps, int n_points, int first_code, int width,
             u8 *out) {
#define ADD_POINTS(first, count, shift, mask, up, sum)                                                  \
  do {                                                                                                  \
    i32 codes[W];                                                                                       \
    for (i64 i = 0; i < (count); i++) codes[i] = first_code;                                            \
    for (int p = 0; p < n_points; p++) {                                                                \
      float point = points[p];                                                                          \
      i32 step = steps[p];                                                                              \
      for (i64 i = 0; i < (count); i++) codes[i] += x[(first) + i] > point ? step : 0;                  \
    }                                                                                                   \
    for (i64 i = 0; i < (count); i++) sum[i] |= (u8)(((codes[i] >> (shift)) & (mask)) << (up));         \
  } while (0)
  ENCODE_PIECES(n, width, out, ADD_POINTS);
}

/* code * step + first, times `factor` if there is one. */
void br_decode(const u8 *packed, i64 n, int width, float first, float step, const float *factor, float *out) {
  PARALLEL for (i64 at = 0; at < n; at += LONGEST) {
    u8 codes[LONGEST];
    i64 count = least(LONGEST, n - at);
    decode_bytes(packed, n, width, at, at + count, codes);
    if (factor)
      for (i64 i = 0; i < count; i++) out[at + i] = ((float)codes[i] * step + first) * factor[at + i];
    else
      for (i64 i = 0; i < count; i++) out[at + i] = (float)codes[i] * step + first;
  }
}

/* Selection (packing.py): keys = magnitude bits | row; `top` holds each column's k largest, falling. */

INLINE void select_row(const void *x, int kind, i64 at, i64 count, i32 mask, i32 row, int k, i32 top[][W]) {
  const u32 *wide = (const u32 *)x + at;
  const u16 *half = (const u16 *)x + at;
  for (i64 c = 0; c < count; c++) {
    u32 bits = kind == F32 ? wide[c] : (u32)half[c] << 16;
    i32 key = (i32)(bits & 0x7FFFFFFF & ~(u32)mask) | row;
    for (int j = 0; j < k; j++) {
      i32 had = top[j][c];
      top[j][c] = had > key ? had : key;
      key = had > key ? key : had;
    }
  }
}

INLINE void select_rows(const void *x, int kind, i64 start, i64 m, i64 n, i64 end, i64 count, i32 mask, int k,
                        i32 top[][W]) {
  for (int j = 0; j < k; j++)
    for (i64 c = 0; c < count; c++) top[j][c] = -1;
  for (i64 row = 0; row < n - 1; row++) select_row(x, kind, start + row * m, count, mask, (i32)row, k, top);
  select_row(x, kind, start + (n - 1) * m, end, mask, (i32)(n - 1), k, top);
}

INLINE void select_any(const void *x, int kind, i64 start, i64 m, i64 n, i64 end, i64 count, i32 mask, int k,
                       i32 top[][W]) {
  switch (k) { /* a constant k is unrolled */
  case 1: select_rows(x, kind, start, m, n, end, count, mask, 1, top); break;
  case 2: select_rows(x, kind, start, m, n, end, count, mask, 2, top); break;
  case 3: select_rows(x, kind, start, m, n, end, count, mask, 3, top); break;
  case 4: select_rows(x, kind, start, m, n, end, count, mask, 4, top); break;
  default: select_rows(x, kind, start, m, n, end, count, mask, k, top);
  }
}

/* Places rising in every column: odd-even transposition. */
INLINE void sort_places(i32 place[][W], int k, i64 count) {
  for (int round = 0; round < k; round++)
    for (int i = round % 2; i < k - 1; i += 2)
      for (i64 c = 0; c < count; c++) {
        i32 a = place[i][c], b = place[i + 1][c];
        place[i][c] = a < b ? a : b;
        place[i + 1][c] = a < b ? b : a;
      }
}

/* x (spans, size) -> kept (spans, k, m) and packed ranks (spans, rank_bytes). Returns 0, or 1 without memory. */
int br_pack(const void *x, int kind, i64 spans, i64 size, i64 n, int k, i64 m, int place_bits, const i32 *binomials,
            void *kept, int kept_kind, int rank_bits, i64 rank_bytes, u8 *ranks_out) {
  i64 blocks = (m + W - 1) / W, last_row = size - (n - 1) * m;
  i32 mask = (1 << place_bits) - 1;
  i32 *ranks = malloc((size_t)(spans * m) * sizeof(i32));
  if (!ranks) return 1;
  PARALLEL for (i64 job = 0; job < spans * blocks; job++) {
    i32 place[MOST_KEPT][W], rank[W];
    i64 span = job / blocks, a = job % blocks * W, count = least(W, m - a), start = span * size + a;
    i64 end = last_row - a < 0 ? 0 : least(count, last_row - a);
    if (kind == F32)
      select_any(x, F32, start, m, n, end, count, mask, k, place);
    else
      select_any(x, BF16, start, m, n, end, count, mask, k, place);
    for (int j = 0; j < k; j++)
      for (i64 c = 0; c < count; c++) place[j][c] &= mask;
    sort_places(place, k, count);
    for (i64 c = 0; c < count; c++) rank[c] = place[0][c];
    for (int j = 1; j < k; j++)
      for (i64 c = 0; c < count; c++) rank[c] += binomials[j * n + place[j][c]];
    memcpy(ranks + span * m + a, rank, (size_t)count * 4);
    for (int j = 0; j < k; j++) {
      i64 to = (span * k + j) * m + a;
      for (i64 c = 0; c < count; c++) {
        i64 from = start + place[j][c] * m + c;
        if (kind == BF16 && kept_kind == BF16)
          ((u16 *)kept)[to + c] = ((const u16 *)x)[from];
        else {
          float value = kind == F32 ? ((const float *)x)[from] : as_float((u32)((const u16 *)x)[from] << 16);
          if (kept_kind == F32)
            ((float *)kept)[to + c] = value;
          else
            ((u16 *)kept)[to + c] = to_bf16(value);
        }
      }
    }
  }
  for (i64 span = 0; span < spans; span++) pack_ranks(ranks + span * m, m, rank_bits, ranks_out + span * rank_bytes);
  free(ranks);
  return 0;
}

/* values (spans, k, m) at the places of the packed ranks, zeros elsewhere: out (spans, size), float. */
void br_unpack(const void *values, int kind, const u8 *packed, const u16 *subsets, i64 n_subsets, i64 spans, i64 size,
               i64 n, int k, i64 m, int rank_bits, i64 rank_bytes, float *out) {
  i64 blocks = (m + W - 1) / W, last_row = size - (n - 1) * m;
  PARALLEL for (i64 job = 0; job < spans * blocks; job++) {
    i32 rank[W];
    i64 span = job / blocks, a = job % blocks * W, count = least(W, m - a);
    i64 end = last_row - a < 0 ? 0 : least(count, last_row - a);
    float *to = out + span * size + a;
    decode_range(packed + span * rank_bytes, m, rank_bits, a, a + count, rank);
    for (i64 row = 0; row < n - 1; row++) memset(to + row * m, 0, (size_t)count * 4);
    memset(to + (n - 1) * m, 0, (size_t)end * 4);
    for (int j = 0; j < k; j++) {
      i64 from = (span * k + j) * m + a;
      const u16 *places = subsets + j * n_subsets;
      for (i64 c = 0; c < count; c++) {
        float value = kind == F32 ? ((const float *)values)[from + c]
                                  : as_float((u32)((const u16 *)values)[from + c] << 16);
        to[places[rank[c]] * m + c] = value;
      }
    }
  }
}

/* int8 with a bfloat16 scale for every 128 values of a span (values.py). */
void br_encode8(const float *x, i64 spans, i64 n, int8_t *codes, u16 *scales) {
  i64 blocks = (n + BLOCK - 1) / BLOCK;
  PARALLEL for (i64 job = 0; job < spans * blocks; job++) {
    i64 span = job / blocks, a = job % blocks * BLOCK, count = least(BLOCK, n - a);
    const float *from = x + span * n + a;
    int8_t *to = codes + span * n + a;
    u32 largest = 0; /* of magnitudes as integers: NaN is the largest */
    for (i64 i = 0; i < count; i++) {
      u32 bits = as_bits(from[i]) & 0x7FFFFFFF;
      largest = largest > bits ? largest : bits;
    }
    u16 scale = to_bf16(as_float(largest) / 127);
    float divisor = as_float((u32)scale << 16);
    scales[job] = scale;
    if (divisor < 1.17549435e-38f) divisor = 1.17549435e-38f;
    for (i64 i = 0; i < count; i++) {
      float q = rintf(from[i] / divisor);
      q = q > -127 ? q : -127;
      to[i] = (int8_t)(q < 127 ? q : 127);
    }
  }
}

void br_decode8(const int8_t *codes, const u16 *scales, i64 spans, i64 n, float *out) {
  i64 blocks = (n + BLOCK - 1) / BLOCK;
  PARALLEL for (i64 job = 0; job < spans * blocks; job++) {
    i64 span = job / blocks, a = job % blocks * BLOCK, count = least(BLOCK, n - a);
    float scale = as_float((u32)scales[job] << 16);
    for (i64 i = 0; i < count; i++) out[span * n + a + i] = (float)codes[span * n + a + i] * scale;
  }
}

/* Low bits (lowbit.py): x (blocks, rows, columns) in groups of `group` rows of a column, each with its two ends. */

INLINE float load(const void *x, int kind, i64 at) {
  return kind == F32 ? ((const float *)x)[at] : as_float((u32)((const u16 *)x)[at] << 16);
}

/* The largest bfloat16 that is no larger. */
INLINE float downwards(float f) {
  u32 bits = as_bits(f), cut = bits & 0xFFFF0000u;
  return as_float((bits >> 31) && cut != bits ? cut + 0x10000u : cut);
}

/* What is taken of x: its elements, or with `rstd` a norm's x^ = (x - mean) rstd, of which both are one a row. */
typedef struct {
  const float *mean, *rstd;
} Norm;

INLINE float mean_of(const Norm *norm, i64 row) { return norm && norm->mean ? norm->mean[row] : 0.0f; }
INLINE float normal(const Norm *norm, float v, float mean, float rstd) { return norm ? (v - mean) * rstd : v; }

/* Least and largest of what is there and of `rows` rows, `count` columns side by side. A NaN stays. */
INLINE void find_ends_further(const void *x, int kind, const Norm *norm, i64 row, i64 start, i64 columns, i64 rows,
                              i64 count, float *low, float *high) {
  for (i64 r = 0; r < rows; r++) {
    float mean = mean_of(norm, row + r), rstd = norm ? norm->rstd[row + r] : 1.0f;
    for (i64 c = 0; c < count; c++) {
      float v = normal(norm, load(x, kind, start + r * columns + c), mean, rstd);
      low[c] = (v < low[c]) | (v != v) ? v : low[c];
      high[c] = (v > high[c]) | (v != v) ? v : high[c];
    }
  }
}

INLINE void find_ends(const void *x, int kind, const Norm *norm, i64 row, i64 start, i64 columns, i64 rows, i64 count,
                      float *low, float *high) {
  float mean = mean_of(norm, row), rstd = norm ? norm->rstd[row] : 1.0f;
  for (i64 c = 0; c < count; c++) low[c] = high[c] = normal(norm, load(x, kind, start + c), mean, rstd);
  find_ends_further(x, kind, norm, row + 1, start + columns, columns, rows - 1, count, low, high);
}

#define LANES 16
/* The same of one column, whose rows stand side by side, in LANES parts: what is left is to compare these. */
INLINE void find_ends_alone(const void *x, int kind, i64 start, i64 rows, float *low, float *high) {
  i64 tall = rows / LANES;
  if (tall) {
    find_ends(x, kind, 0, 0, start, LANES, tall, LANES, low, high);
    find_ends_further(x, kind, 0, 0, start + tall * LANES, LANES, 1, rows % LANES, low, high);
  } else {
    for (i64 l = 0; l < LANES; l++) low[l] = high[l] = load(x, kind, start);
    find_ends_further(x, kind, 0, 0, start, LANES, 1, rows, low, high);
  }
}

/* Of `count` groups with these ends: the first level in `low`, 1/step in `inverse`, and both ends as they are kept. */
INLINE void set_levels(i64 count, float shrink, float top, float *low, const float *high, float *inverse, u16 *first,
                       u16 *step, i64 apart) {
  for (i64 c = 0; c < count; c++) {
    float inside = (high[c] - low[c]) * shrink, least_level = downwards(low[c] + inside);
    u16 half = to_bf16((high[c] - inside - least_level) / top);
    float distance = as_float((u32)half << 16);
    first[c * apart] = (u16)(as_bits(least_level) >> 16);
    step[c * apart] = half;
    low[c] = least_level;
    inverse[c] = distance > 0 ? 1 / distance : 0;
  }
}

INLINE u8 lowbit_code(float x, float first, float inverse, float top) {
  float q = rintf((x - first) * inverse);
  q = q > 0 ? q : 0;
  return (u8)(i32)(q < top ? q : top);
}

/* Columns of a job, of which there are at least `others`: all of them, unless that leaves threads without work. */
static i64 strip_of(i64 columns, i64 others) {
#ifdef _OPENMP
  i64 jobs = 4 * (i64)omp_get_max_threads();
#else
  i64 jobs = 1;
#endif
  i64 strips = least((jobs + others - 1) / others, (columns + W - 1) / W);
  i64 fewest = (columns + LONGEST - 1) / LONGEST;
  if (strips < fewest) strips = fewest;
  return (columns + strips - 1) / strips;
}

INLINE void lowbit_codes(const void *x, int kind, const Norm *norm, i64 blocks, i64 rows, i64 columns, i64 group,
                         int width, float shrink, u16 *ends, u8 *codes) {
  i64 groups = (rows + group - 1) / group, strip_columns = strip_of(columns, blocks * groups);
  i64 strips = (columns + strip_columns - 1) / strip_columns;
  float top = (float)((1 << width) - 1);
  PARALLEL for (i64 job = 0; job < blocks * groups * strips; job++) {
    float low[LONGEST], high[LONGEST], inverse[LONGEST];
    i64 strip = job % strips, g = job / strips % groups, b = job / strips / groups;
    i64 c0 = strip * strip_columns, count = least(strip_columns, columns - c0), here = least(group, rows - g * group);
    i64 row = b * rows + g * group, start = row * columns + c0;
    u16 *to = ends + (b * groups + g) * 2 * columns + c0;
    find_ends(x, kind, norm, row, start, columns, here, count, low, high);
    set_levels(count, shrink, top, low, high, inverse, to, to + columns, 1);
    for (i64 r = 0; r < here; r++) {
      float mean = mean_of(norm, row + r), rstd = norm ? norm->rstd[row + r] : 1.0f;
      for (i64 c = 0; c < count; c++) {
        i64 at = start + r * columns + c;
        codes[at] = lowbit_code(normal(norm, load(x, kind, at), mean, rstd), low[c], inverse[c], top);
      }
    }
  }
}

/* Of one column: W groups at a time. */
INLINE void lowbit_codes_alone(const void *x, int kind, i64 blocks, i64 rows, i64 group, int width, float shrink,
                               u16 *ends, u8 *codes) {
  i64 groups = (rows + group - 1) / group, all = blocks * groups;
  float top = (float)((1 << width) - 1);
  PARALLEL for (i64 job = 0; job < all; job += W) {
    float low[W], high[W], inverse[W], lows[W * LANES], highs[W * LANES];
    i64 start[W], here[W], count = least(W, all - job), b = job / groups, g = job % groups;
    for (i64 i = 0; i < count; i++) {
      start[i] = b * rows + g * group;
      here[i] = least(group, rows - g * group);
      find_ends_alone(x, kind, start[i], here[i], lows + i * LANES, highs + i * LANES);
      if (++g == groups) g = 0, b++;
    }
    for (i64 i = 0; i < count; i++) low[i] = lows[i * LANES], high[i] = highs[i * LANES];
    for (i64 l = 1; l < LANES; l++)
      for (i64 i = 0; i < count; i++) {
        float u = lows[i * LANES + l], v = highs[i * LANES + l];
        low[i] = (u < low[i]) | (u != u) ? u : low[i];
        high[i] = (v > high[i]) | (v != v) ? v : high[i];
      }
    set_levels(count, shrink, top, low, high, inverse, ends + 2 * job, ends + 2 * job + 1, 2);
    for (i64 i = 0; i < count; i++) {
      float first = low[i], factor = inverse[i];
      u8 *restrict to = codes + start[i];
      for (i64 r = 0; r < here[i]; r++) to[r] = lowbit_code(load(x, kind, start[i] + r), first, factor, top);
    }
  }
}

/* Of x, or with `rstd` of a norm's x^ of more than one column. Returns 0, or 1 without memory. */
int br_lowbit_pack(const void *x, int kind, const float *mean, const float *rstd, i64 blocks, i64 rows, i64 columns,
                   i64 group, int width, float shrink, u16 *ends, u8 *packed) {
  i64 n = blocks * rows * columns;
  Norm norm = {mean, rstd};
  u8 *codes = width == 8 ? packed : malloc((size_t)n);
  if (!codes) return 1;
  if (columns == 1 && kind == F32)
    lowbit_codes_alone(x, F32, blocks, rows, group, width, shrink, ends, codes);
  else if (columns == 1)
    lowbit_codes_alone(x, BF16, blocks, rows, group, width, shrink, ends, codes);
  else if (rstd)
    lowbit_codes(x, F32, &norm, blocks, rows, columns, group, width, shrink, ends, codes);
  else if (kind == F32)
    lowbit_codes(x, F32, 0, blocks, rows, columns, group, width, shrink, ends, codes);
  else
    lowbit_codes(x, BF16, 0, blocks, rows, columns, group, width, shrink, ends, codes);
  if (width == 8) return 0;
  br_pack_bytes(codes, n, width, packed);
  free(codes);
  return 0;
}

void br_lowbit_unpack(const u8 *packed, const u16 *ends, i64 blocks, i64 rows, i64 columns, i64 group, int width,
                      float *out) {
  i64 groups = (rows + group - 1) / group, n = blocks * rows * columns;
  /* A job is a strip of a block's group: of one column all its rows. */
  i64 strip_columns = strip_of(columns, blocks * groups), strips = (columns + strip_columns - 1) / strip_columns;
  PARALLEL for (i64 job = 0; job < blocks * groups * strips; job++) {
    float first[LONGEST], step[LONGEST];
    u8 codes[LONGEST];
    i64 strip = job % strips, g = job / strips % groups, b = job / strips / groups;
    i64 c0 = strip * strip_columns, count = least(strip_columns, columns - c0), here = least(group, rows - g * group);
    i64 start = (b * rows + g * group) * columns + c0;
    const u16 *from = ends + (b * groups + g) * 2 * columns + c0;
    for (i64 c = 0; c < count; c++) {
      first[c] = as_float((u32)from[c] << 16);
      step[c] = as_float((u32)from[columns + c] << 16);
    }
    if (columns == 1)
      for (i64 r = 0; r < here; r += LONGEST) {
        i64 part = least(LONGEST, here - r);
        decode_bytes(packed, n, width, start + r, start + r + part, codes);
        for (i64 i = 0; i < part; i++) out[start + r + i] = (float)codes[i] * step[0] + first[0];
      }
    else
      for (i64 r = 0; r < here; r++) {
        i64 at = start + r * columns;
        decode_bytes(packed, n, width, at, at + count, codes);
        for (i64 c = 0; c < count; c++) out[at + c] = (float)codes[c] * step[c] + first[c];
      }
  }
}

/* PyTorch's random numbers on a CPU: a Mersenne Twister (Matsumoto and Nishimura, 1998). */

#define MT_SIZE 624
#define MT_AHEAD 397

INLINE u32 mt_mix(u32 high, u32 low) {
  return (((high & 0x80000000u) | (low & 0x7FFFFFFFu)) >> 1) ^ ((low & 1) ? 0x9908B0DFu : 0);
}

static void mt_next_state(u32 *s) {
  for (int i = 0; i < MT_SIZE - MT_AHEAD; i++) s[i] = s[i + MT_AHEAD] ^ mt_mix(s[i], s[i + 1]);
  for (int i = MT_SIZE - MT_AHEAD; i < MT_SIZE - 1; i++) s[i] = s[i + MT_AHEAD - MT_SIZE] ^ mt_mix(s[i], s[i + 1]);
  s[MT_SIZE - 1] = s[MT_AHEAD - 1] ^ mt_mix(s[MT_SIZE - 1], s[0]);
}

static void mt_outputs(const u32 *s, u32 *out) {
  for (int i = 0; i < MT_SIZE; i++) {
    u32 y = s[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9D2C5680u;
    y ^= (y << 15) & 0xEFC60000u;
    out[i] = y ^ (y >> 18);
  }
}

/* kept[i] = whether the i-th number in [0, 2^53) is below `below`: two outputs each, the first for the high bits. The
 * generator is PyTorch's, as Generator.get_state gives it, and is moved on: outputs left + 1 (int32 at 8), the place of
 * the next (uint64 at 16), 624 words (uint64 each, from 24). Returns 0, or 1 where that is no such place. */
int br_bernoulli(u8 *generator, i64 n, i64 below, u8 *kept) {
  u32 state[MT_SIZE], outputs[MT_SIZE];
  u64 words[MT_SIZE], place;
  i32 left;
  memcpy(&left, generator + 8, sizeof left);
  memcpy(&place, generator + 16, sizeof place);
  memcpy(words, generator + 24, sizeof words);
  for (int i = 0; i < MT_SIZE; i++) state[i] = (u32)words[i];
  if (left != 1 && place > MT_SIZE) return 1;
  int at = left == 1 ? MT_SIZE : (int)place;
  mt_outputs(state, outputs);
  for (i64 i = 0; i < n;) {
    i64 pairs = least((MT_SIZE - at) / 2, n - i);
    for (i64 j = 0; j < pairs; j++) {
      u64 high = outputs[at + 2 * j] & 0x1FFFFFu, low = outputs[at + 2 * j + 1];
      kept[i + j] = (i64)(high << 32 | low) < below;
    }
    i += pairs;
    at += (int)(2 * pairs);
    if (i == n) break;
    u64 high = outputs[MT_SIZE - 1] & 0x1FFFFFu;
    int split = at == MT_SIZE - 1; /* a number's outputs lie on both sides of the next state */
    mt_next_state(state);
    mt_outputs(state, outputs);
    if (split) kept[i++] = (i64)(high << 32 | outputs[0]) < below;
    at = split;
  }
  for (int i = 0; i < MT_SIZE; i++) words[i] = state[i];
  left = MT_SIZE - at + 1;
  place = (u64)at;
  memcpy(generator + 8, &left, sizeof left);
  memcpy(generator + 16, &place, sizeof place);
  memcpy(generator + 24, words, sizeof words);
  return 0;
}

/* y = x * (kept ? scale : 0), as a product, so that what is no number stays none. */
void br_dropout(const float *x, const u8 *kept, i64 n, float scale, float *y) {
  PARALLEL for (i64 at = 0; at < n; at += W) {
    i64 end = least(n, at + W);
    for (i64 i = at; i < end; i++) y[i] = x[i] * (kept[i] ? scale : 0.0f);
  }
}
