// Causal 3x3x3 convolutions of the VAE on Hopper: norm + SiLU + cached past in one kernel, the convolution in another.
//
// In time two output frames share four products instead of six (Winograd's F(2, 3)): with d0 .. d3 the frames that
// they read and g0 .. g2 the kernel's three temporal taps,
//
//     m0 = (d0 - d2) g0                  m1 = (d1 + d2) (g0 + g1 + g2) / 2       out0 = m0 + m1 + m2
//     m3 = (d3 - d1) g2                  m2 = (d2 - d1) (g0 - g1 + g2) / 2       out1 = m1 - m2 + m3
//
// each of them a 3x3 convolution. Positions of a frame are flattened with one zero column after every row and a zero row
// above and below, so that each spatial tap is one constant offset. A plane lies as [C/8][positions][8]: any run of
// positions of 8 channels is contiguous, which a bulk copy fetches and which the tensor cores read, unswizzled, from any
// 16-byte aligned start; so one copy in shared memory serves the three taps of a row.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr int ROWS = 256;               // positions of a tile
constexpr int RUN = ROWS + 2;           // positions that a row of taps reads
constexpr int RUN_BYTES = RUN * 16;     // ... of 8 channels
constexpr int RUN_PITCH = 264 * 16;     // ... in shared memory
constexpr int A_BYTES = 4 * RUN_PITCH;  // two planes of 16 channels, or one of 32
constexpr int NORM_THREADS = 256;
constexpr int SOFTMAX_THREADS = 256;
constexpr int CHUNKS = 3; // of 8 channels that a thread of the norm holds

// What a kernel multiplies: tiles of COLUMNS output channels, with weights of TAPS taps (of 16 channels) at a time.
template <int COLUMNS_, int TAPS_, int STAGES_> struct Shape {
    static constexpr int COLUMNS = COLUMNS_;
    static constexpr int TAP_BYTES = COLUMNS * 32;
    static constexpr int B_BYTES = TAPS_ * TAP_BYTES;
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int STAGES = STAGES_; // copies in flight
};
using Conv = Shape<96, 6, 6>;
using Head = Shape<8, 6, 10>;
using Upsample = Shape<96, 8, 5>;

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}\n" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// K-major without swizzle: 8 rows of 16 bytes are contiguous, 8 rows further are 128 bytes further.
__device__ __forceinline__ u64 descriptor(u32 address, u32 k_bytes) {
    return (u64)((address & 0x3FFFF) >> 4) | ((u64)(k_bytes >> 4) << 16) | ((u64)(128 >> 4) << 32);
}

#define D4(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define D16(a, i) D4(a, i), D4(a, i + 4), D4(a, i + 8), D4(a, i + 12)

__device__ __forceinline__ void multiply(float (&d)[48], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
                 "%48, %49, 1, 1, 1, 0, 0;"
                 : D16(d, 0), D16(d, 16), D16(d, 32)
                 : "l"(a), "l"(b));
}

__device__ __forceinline__ void multiply(float (&d)[4], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : D4(d, 0)
                 : "l"(a), "l"(b));
}

__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ __forceinline__ u32 pack(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ float silu(float x) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return x * inverse;
}
__device__ __forceinline__ u32 add(u32 a, u32 b) {
    asm("add.rn.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
__device__ __forceinline__ u32 subtract(u32 a, u32 b) {
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
__device__ __forceinline__ uint4 add(uint4 a, uint4 b) {
    return make_uint4(add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w));
}
__device__ __forceinline__ uint4 subtract(uint4 a, uint4 b) {
    return make_uint4(subtract(a.x, b.x), subtract(a.y, b.y), subtract(a.z, b.z), subtract(a.w, b.w));
}

struct Ring { // of stages, in shared memory
    u32 memory, full, empty;
    int stage = 0;
    u32 parity = 0;

    template <class S> __device__ __forceinline__ void open(unsigned char* memory_, u64* barriers) {
        memory = shared_address(memory_);
        full = shared_address(barriers);
        empty = full + 8 * S::STAGES;
        if (threadIdx.x == 0) {
            for (int i = 0; i < S::STAGES; i++) {
                barrier_init(full + 8 * i, 1);
                barrier_init(empty + 8 * i, 2);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }
    template <class S> __device__ __forceinline__ void advance() {
        if (++stage == S::STAGES) stage = 0, parity ^= 1;
    }
    // Fetch four runs, `run_step` or `plane_step` elements apart, and the weights of a stage.
    template <class S>
    __device__ __forceinline__ void fetch(const u16* a, u64 run_step, u64 plane_step, const u16* b) {
        barrier_wait(empty + 8 * stage, parity ^ 1);
        const u32 barrier = full + 8 * stage, to = memory + stage * S::STAGE_BYTES;
        barrier_expect(barrier, 4 * RUN_BYTES + S::B_BYTES);
        bulk_copy(to + A_BYTES, b, S::B_BYTES, barrier);
#pragma unroll
        for (int run = 0; run < 4; run++)
            bulk_copy(to + run * RUN_PITCH, a + (run / 2) * plane_step + (run % 2) * run_step, RUN_BYTES, barrier);
        advance<S>();
    }
};

// Let the tensor cores run through `count` stages; `stage_products(a, b)` issues those of one.
template <class S, class F> __device__ __forceinline__ void multiply_stages(Ring& ring, int count, F stage_products) {
    const u32 first_row = (threadIdx.x / 128 - 1) * 128;
    const bool speaks = threadIdx.x % 128 == 0;
    int previous = -1;
#pragma unroll 1
    for (int index = 0; index < count; index++) {
        barrier_wait(ring.full + 8 * ring.stage, ring.parity);
        const u32 memory = ring.memory + ring.stage * S::STAGE_BYTES;
        multiply_fence();
        stage_products(memory + first_row * 16, memory + A_BYTES);
        multiply_commit();
        multiply_wait<1>();
        if (previous >= 0 && speaks) barrier_arrive(ring.empty + 8 * previous);
        previous = ring.stage;
        ring.advance<S>();
    }
    multiply_wait<0>();
    if (speaks) barrier_arrive(ring.empty + 8 * previous);
}

// The products of one 64-row half with taps of 16 channels.
template <class S, int N> __device__ __forceinline__ void multiply_tap(float (&d)[N], u32 a, int plane, int row, u32 b, int tap) {
    multiply(d, descriptor(a + plane * 2 * RUN_PITCH + row * 16, RUN_PITCH),
             descriptor(b + tap * S::TAP_BYTES, S::COLUMNS * 16));
}

// Sum up two output frames of a tile.
template <class S, int N>
__device__ __forceinline__ void convolve(Ring& ring, int chunks, bool both, float (&sums)[2][2][N]) {
#pragma unroll
    for (int i = 0; i < N; i++) sums[0][0][i] = sums[0][1][i] = sums[1][0][i] = sums[1][1][i] = 0.0f;
    auto products = [&](u32 a, u32 b) {
#pragma unroll
        for (int dx = 0; dx < 3; dx++) {
            multiply_tap<S>(sums[0][0], a, 0, dx, b, dx);
            multiply_tap<S>(sums[0][1], a, 0, 64 + dx, b, dx);
            multiply_tap<S>(sums[1][0], a, 1, dx, b, 3 + dx);
            multiply_tap<S>(sums[1][1], a, 1, 64 + dx, b, 3 + dx);
        }
    };
    multiply_stages<S>(ring, 3 * chunks, products);
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            sums[0][half][i] += sums[1][half][i];                               // m1 + m2
            sums[1][half][i] = fmaf(-2.0f, sums[1][half][i], sums[0][half][i]); // m1 - m2
        }
    }
    if (both) {
        multiply_stages<S>(ring, 3 * chunks, products);
    } else { // a last frame alone: m0
        multiply_stages<S>(ring, 3 * chunks, [&](u32 a, u32 b) {
#pragma unroll
            for (int dx = 0; dx < 3; dx++) {
                multiply_tap<S>(sums[0][0], a, 0, dx, b, dx);
                multiply_tap<S>(sums[0][1], a, 0, 64 + dx, b, dx);
            }
        });
    }
}

// Fetch what `convolve` reads; `near_end()` is called some microseconds before the last of it is used.
template <class S, class F>
__device__ __forceinline__ void fetch_tile(Ring& ring, const u16* a, const u16* b, int chunks, int pitch, u64 plane,
                                           F near_end) {
    const u64 run = (u64)plane * 8, planes = run * chunks * 2; // elements from a run to the next, a product to the next
#pragma unroll 1
    for (int left = 6 * chunks, row = 0; row < 6; row++) { // two steps of three rows of taps
        const u16* from = a + (row < 3 ? row : row - 3) * pitch * 8 + (row < 3 ? 0 : 2 * planes);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; chunk++, left--) {
            if (left == 12) near_end();
            ring.fetch<S>(from, run, planes, b);
            from += 2 * run;
            b += S::B_BYTES / 2;
        }
    }
}

__device__ __forceinline__ void become_producer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
__device__ __forceinline__ void become_consumer() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }

// Pixels of a thread's four rows of a tile, or -1 where a row is no pixel.
__device__ __forceinline__ void find_pixels(int tile_position, int height, int width, int (&pixels)[2][2]) {
    const int thread = threadIdx.x - 128, pitch = width + 1;
    const int position = tile_position + thread / 32 * 16 + thread / 128 * 64 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = position + i / 2 * 64 + i % 2 * 8, y = at / pitch, x = at - y * pitch;
        pixels[i / 2][i % 2] = y < height && x < width ? y * width + x : -1;
    }
}

// Bring a tile of [T][H][W][channels], two frames, to the level-2 cache.
__device__ __forceinline__ void prefetch_tile(const u16* x, int position, int pair, int frames, int height, int width,
                                              int channels) {
    const int y = position / (width + 1), x_at = min(position - y * (width + 1), width - 1), pixel = y * width + x_at;
    const u32 bytes = min(ROWS, height * width - pixel) * channels * 2;
#pragma unroll 1
    for (int frame = 2 * pair; frame < min(2 * pair + 2, frames); frame++) {
        const u16* from = x + ((u64)frame * height * width + pixel) * channels;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
    }
}

// planes:   [pairs][4][C/8][plane][8]: d1 + d2, d2 - d1, d0 - d2, d3 - d1 of every pair of output frames
// weights:  [out/96][2][3][C/16][2][3][2][96][8]: column tile, step, row of taps, channels, plane, tap, 8 channels, column
// residual: [T][H][W][out] or null
// out:      [T][H][W][out]
extern "C" __global__ void __launch_bounds__(384, 1)
    vae_conv(const u16* __restrict__ planes, const u16* __restrict__ weights, const u16* __restrict__ bias,
             const u16* __restrict__ residual, u16* __restrict__ out, int frames, int height, int width, int in_channels,
             int out_channels, int plane) {
    using S = Conv;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ __align__(8) u64 barriers[2 * S::STAGES];
    const int pitch = width + 1, chunks = in_channels / 16;
    const int row_tiles = (height * pitch + ROWS - 1) / ROWS, column_tiles = out_channels / S::COLUMNS;
    const int tiles = row_tiles * column_tiles * ((frames + 1) / 2);
    const u32 frame_size = height * width * out_channels;
    Ring ring;
    ring.open<S>(memory, barriers);

    if (threadIdx.x < 128) {
        become_producer();
        if (threadIdx.x > 0) return;
#pragma unroll 1
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int column_tile = tile % column_tiles, rest = tile / column_tiles;
            const int position = rest % row_tiles * ROWS, pair = rest / row_tiles;
            // Position 0 of a frame has a zero row and one more position before it.
            fetch_tile<S>(ring, planes + ((u64)pair * in_channels * 4 * plane + (u64)position * 8),
                          weights + (u64)column_tile * chunks * 6 * (S::B_BYTES / 2), chunks, pitch, plane, [&] {
                              if (residual && column_tile == 0)
                                  prefetch_tile(residual, position, pair, frames, height, width, out_channels);
                          });
        }
        return;
    }
    become_consumer();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int column_tile = tile % column_tiles, rest = tile / column_tiles, pair = rest / row_tiles;
        const int count = min(2, frames - 2 * pair);
        float sums[2][2][S::COLUMNS / 2];
        convolve<S>(ring, chunks, count == 2, sums);

        int pixels[2][2];
        find_pixels(rest % row_tiles * ROWS, height, width, pixels);
        const u32 first = 2 * pair * frame_size + column_tile * S::COLUMNS + threadIdx.x % 4 * 8;
#pragma unroll
        for (int part = 0; part < 3; part++) {
            const uint4 bias8 = *(const uint4*)(bias + column_tile * S::COLUMNS + threadIdx.x % 4 * 8 + part * 32);
            const u32 bias2[4] = {bias8.x, bias8.y, bias8.z, bias8.w};
#pragma unroll
            for (int which = 0; which < 2; which++) {
                if (which >= count) continue;
                uint4 old[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int pixel = pixels[i / 2][i % 2];
                    const u32 offset = first + which * frame_size + pixel * out_channels + part * 32;
                    old[i] = make_uint4(0, 0, 0, 0);
                    if (residual && pixel >= 0) old[i] = __ldg((const uint4*)(residual + offset));
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int pixel = pixels[i / 2][i % 2];
                    const u32 offset = first + which * frame_size + pixel * out_channels + part * 32;
                    u32 v[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float* d = &sums[which][i / 2][(part * 4 + j) * 4 + i % 2 * 2];
                        v[j] = pack(d[0] + low(bias2[j]), d[1] + high(bias2[j]));
                    }
                    uint4 value = make_uint4(v[0], v[1], v[2], v[3]);
                    if (residual) value = add(value, old[i]);
                    if (pixel >= 0) *(uint4*)(out + offset) = value;
                }
            }
        }
    }
}

// As vae_conv, for at most 8 output channels, which lie apart: out [out][T][H][W].
extern "C" __global__ void __launch_bounds__(384, 1)
    vae_head(const u16* __restrict__ planes, const u16* __restrict__ weights, const u16* __restrict__ bias,
             u16* __restrict__ out, int frames, int height, int width, int in_channels, int out_channels, int plane) {
    using S = Head;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ __align__(8) u64 barriers[2 * S::STAGES];
    const int pitch = width + 1, chunks = in_channels / 16;
    const int row_tiles = (height * pitch + ROWS - 1) / ROWS, tiles = row_tiles * ((frames + 1) / 2);
    const u32 frame_size = height * width;
    Ring ring;
    ring.open<S>(memory, barriers);

    if (threadIdx.x < 128) {
        if (threadIdx.x > 0) return;
#pragma unroll 1
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int position = tile % row_tiles * ROWS, pair = tile / row_tiles;
            fetch_tile<S>(ring, planes + ((u64)pair * in_channels * 4 * plane + (u64)position * 8), weights, chunks, pitch,
                          plane, [] {});
        }
        return;
    }
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int pair = tile / row_tiles, count = min(2, frames - 2 * pair);
        float sums[2][2][S::COLUMNS / 2];
        convolve<S>(ring, chunks, count == 2, sums);

        int pixels[2][2];
        find_pixels(tile % row_tiles * ROWS, height, width, pixels);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int channel = threadIdx.x % 4 * 2 + e;
            if (channel >= out_channels) continue;
            const float shift = low(bias[channel]);
#pragma unroll
            for (int which = 0; which < 2; which++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int pixel = pixels[i / 2][i % 2];
                    const u32 offset = (channel * frames + 2 * pair + which) * frame_size + pixel;
                    const float value = sums[which][i / 2][i % 2 * 2 + e] + shift;
                    if (pixel >= 0 && which < count) out[offset] = pack(value, value);
                }
            }
        }
    }
}

// Double height and width by repetition, then convolve 3x3: each quarter of the output is a 2x2 convolution of the small
// image, with sums of the taps.
//
// planes:  [T][C/8][plane][8]
// weights: [out/96][2][2][C/32][2][2][2][2][96][8]: column tile, output row, row of taps, 32 channels, 16 channels, output
//          column, tap, 8 channels, column
// out:     [T][2H][2W][out]
extern "C" __global__ void __launch_bounds__(384, 1)
    vae_upsample(const u16* __restrict__ planes, const u16* __restrict__ weights, const u16* __restrict__ bias,
                 u16* __restrict__ out, int frames, int height, int width, int in_channels, int out_channels, int plane) {
    using S = Upsample;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ __align__(8) u64 barriers[2 * S::STAGES];
    const int pitch = width + 1, chunks = in_channels / 32;
    const int row_tiles = (height * pitch + ROWS - 1) / ROWS, column_tiles = out_channels / S::COLUMNS;
    const int tiles = row_tiles * column_tiles * 2 * frames;
    Ring ring;
    ring.open<S>(memory, barriers);

    if (threadIdx.x < 128) {
        become_producer();
        if (threadIdx.x > 0) return;
#pragma unroll 1
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int column_tile = tile % column_tiles, py = tile / column_tiles % 2, rest = tile / column_tiles / 2;
            const int position = rest % row_tiles * ROWS, frame = rest / row_tiles;
            const u16* a = planes + ((u64)frame * in_channels / 8 * plane + position) * 8;
            const u16* b = weights + (u64)(column_tile * 2 + py) * chunks * 2 * (S::B_BYTES / 2);
            for (int dy = 0; dy < 2; dy++) {
                for (int chunk = 0; chunk < chunks; chunk++) {
                    ring.fetch<S>(a + ((u64)chunk * 4 * plane + (dy + py) * pitch) * 8, (u64)plane * 8, (u64)plane * 16, b);
                    b += S::B_BYTES / 2;
                }
            }
        }
        return;
    }
    become_consumer();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int column_tile = tile % column_tiles, py = tile / column_tiles % 2, rest = tile / column_tiles / 2;
        const int frame = rest / row_tiles;
        float sums[2][2][S::COLUMNS / 2];
#pragma unroll
        for (int i = 0; i < S::COLUMNS / 2; i++) sums[0][0][i] = sums[0][1][i] = sums[1][0][i] = sums[1][1][i] = 0.0f;
        multiply_stages<S>(ring, 2 * chunks, [&](u32 a, u32 b) {
#pragma unroll
            for (int i = 0; i < 4; i++) { // 16 channels and a tap
#pragma unroll
                for (int px = 0; px < 2; px++) {
                    multiply_tap<S>(sums[px][0], a, i / 2, px + i % 2, b, i / 2 * 4 + px * 2 + i % 2);
                    multiply_tap<S>(sums[px][1], a, i / 2, 64 + px + i % 2, b, i / 2 * 4 + px * 2 + i % 2);
                }
            }
        });

        int pixels[2][2];
        find_pixels(rest % row_tiles * ROWS, height, width, pixels);
        const u32 channel = column_tile * S::COLUMNS + threadIdx.x % 4 * 8;
#pragma unroll
        for (int part = 0; part < 3; part++) {
            const uint4 bias8 = *(const uint4*)(bias + channel + part * 32);
            const u32 bias2[4] = {bias8.x, bias8.y, bias8.z, bias8.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int pixel = pixels[i / 2][i % 2];
                if (pixel < 0) continue;
                const int y = pixel / width, x = pixel - y * width;
                const u32 row = (frame * height + y) * 2 + py;
#pragma unroll
                for (int px = 0; px < 2; px++) {
                    u32 v[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float* d = &sums[px][i / 2][(part * 4 + j) * 4 + i % 2 * 2];
                        v[j] = pack(d[0] + low(bias2[j]), d[1] + high(bias2[j]));
                    }
                    const u32 offset = (row * 2 * width + 2 * x + px) * out_channels + channel + part * 32;
                    *(uint4*)(out + offset) = make_uint4(v[0], v[1], v[2], v[3]);
                }
            }
        }
    }
}

// x:      [T][H][W][C]; C a multiple of 32
// planes: [T][C/8][plane][8]; positions of no pixel become 0
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    vae_planes(const u16* __restrict__ x, u16* __restrict__ planes, int height, int width, int channels, int plane) {
    constexpr int POSITIONS = 64, WIDTH = 4; // a block's positions, and chunks of 8 channels
    __shared__ uint4 tile[POSITIONS][WIDTH + 1];
    const int pitch = width + 1, first = blockIdx.x * POSITIONS, chunk = blockIdx.y * WIDTH, frame = blockIdx.z;
    {
        const int position = threadIdx.x / WIDTH, c8 = threadIdx.x % WIDTH;
        const int at = first + position - (pitch + 1), y = at / pitch, x_at = at - y * pitch;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (at >= 0 && y < height && x_at < width)
            value = *(const uint4*)(x + (((u64)frame * height + y) * width + x_at) * channels + (chunk + c8) * 8);
        tile[position][c8] = value;
    }
    __syncthreads();
    const int position = threadIdx.x % POSITIONS, c8 = threadIdx.x / POSITIONS;
    if (first + position < plane)
        *(uint4*)(planes + (((u64)frame * channels / 8 + chunk + c8) * plane + first + position) * 8) = tile[position][c8];
}

// x:      [T][H][W][C]; C a multiple of 96, 768 at most
// past:   [2][H][W][C] or null, which stands for zeros
// scale:  [C], on the normalised vector
// planes: as vae_conv reads them; positions of no pixel become 0
// cache:  [2][H][W][C], the last two frames after SiLU; it may be `past` itself
extern "C" __global__ void __launch_bounds__(NORM_THREADS, 3)
    vae_norm(const u16* x, const u16* past, const u16* scale, u16* planes, u16* cache, int frames, int height, int width,
             int channels, int plane) {
    extern __shared__ __align__(128) unsigned char memory[];
    const int threads = channels / (8 * CHUNKS); // that share a position
    const int positions = NORM_THREADS / threads;
    const int row = channels * 2 + 16; // bytes, padded against bank conflicts
    const int slot = positions * row;
    const int pitch = width + 1;
    const int first = blockIdx.x * positions;
    const int mine = threadIdx.x / threads, part = threadIdx.x % threads;
    const int at = first + mine - (pitch + 1);
    const int y = at / pitch, x_at = at - y * pitch;
    const bool inside = at >= 0 && y < height && x_at < width;
    const u64 pixel = inside ? ((u64)y * width + x_at) * channels + part * 8 : 0;
    const u64 frame_size = (u64)height * width * channels;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const float root = sqrtf((float)channels);
    const int position = threadIdx.x % positions, first_chunk = threadIdx.x / positions; // that it writes to planes
    const u64 product = (u64)channels * plane;
    uint4 scales[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) scales[i] = *(const uint4*)(scale + (part + i * threads) * 8);

#pragma unroll
    for (int frame = 0; frame < 2; frame++) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int c = i * threads * 8;
            const uint4 value = past && inside ? *(const uint4*)(past + frame * frame_size + pixel + c) : zero;
            *(uint4*)(memory + frame * slot + mine * row + (part * 8 + c) * 2) = value;
            if (frames == 1 && frame == 1 && inside) *(uint4*)(cache + pixel + c) = value;
        }
    }
    for (int pair = 0; 2 * pair < frames; pair++) {
        uint4 values[2][CHUNKS];
        float squares[2] = {0.0f, 0.0f};
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const int frame = 2 * pair + which;
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                values[which][i] =
                    inside && frame < frames ? *(const uint4*)(x + frame * frame_size + pixel + i * threads * 8) : zero;
            }
        }
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const int frame = 2 * pair + which;
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const u32 v[4] = {values[which][i].x, values[which][i].y, values[which][i].z, values[which][i].w};
#pragma unroll
                for (int j = 0; j < 4; j++) squares[which] += low(v[j]) * low(v[j]) + high(v[j]) * high(v[j]);
            }
            for (int other = threads / 2; other > 0; other /= 2)
                squares[which] += __shfl_xor_sync(0xFFFFFFFFu, squares[which], other);
            const float factor = root / fmaxf(sqrtf(squares[which]), 1e-12f);
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const int c = i * threads * 8;
                const u32 s[4] = {scales[i].x, scales[i].y, scales[i].z, scales[i].w};
                u32 v[4] = {values[which][i].x, values[which][i].y, values[which][i].z, values[which][i].w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float a = low(v[j]) * factor * low(s[j]), b = high(v[j]) * factor * high(s[j]);
                    v[j] = pack(silu(a), silu(b));
                }
                const uint4 value = make_uint4(v[0], v[1], v[2], v[3]);
                const int kept = frame - (frames - 2);
                if (inside && frame < frames && kept >= 0) *(uint4*)(cache + kept * frame_size + pixel + c) = value;
                *(uint4*)(memory + ((2 * pair + 2 + which) & 3) * slot + mine * row + (part * 8 + c) * 2) = value;
            }
        }
        __syncthreads();
        const unsigned char *d0 = memory + ((2 * pair) & 3) * slot, *d1 = memory + ((2 * pair + 1) & 3) * slot;
        const unsigned char *d2 = memory + ((2 * pair + 2) & 3) * slot, *d3 = memory + ((2 * pair + 3) & 3) * slot;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int c8 = first_chunk + i * threads, offset = position * row + c8 * 16;
            const uint4 v0 = *(const uint4*)(d0 + offset), v1 = *(const uint4*)(d1 + offset);
            const uint4 v2 = *(const uint4*)(d2 + offset), v3 = *(const uint4*)(d3 + offset);
            if (first + position >= plane) continue;
            u16* to = planes + (((u64)pair * channels / 2 + c8) * plane + first + position) * 8;
            *(uint4*)to = add(v1, v2);
            *(uint4*)(to + product) = subtract(v2, v1);
            *(uint4*)(to + 2 * product) = subtract(v0, v2);
            *(uint4*)(to + 3 * product) = subtract(v3, v1);
        }
        __syncthreads();
    }
}

// Softmax over rows of `width` in place; `width` a multiple of 8, 8192 at most.
extern "C" __global__ void __launch_bounds__(SOFTMAX_THREADS) vae_softmax(u16* scores, int width) {
    constexpr int CHUNKS_OF_ROW = 4; // of 8 scores, that a thread holds
    __shared__ float partial[2][SOFTMAX_THREADS / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint4* row = (uint4*)(scores + (u64)blockIdx.x * width);
    float values[CHUNKS_OF_ROW][8], top = __uint_as_float(0xFF800000u), total = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS_OF_ROW; i++) {
        const int at = threadIdx.x + i * SOFTMAX_THREADS;
        const u32 none = 0xFF80FF80u; // two times minus infinity
        const uint4 chunk = at < width / 8 ? row[at] : make_uint4(none, none, none, none);
        const u32 v[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            values[i][2 * j] = low(v[j]), values[i][2 * j + 1] = high(v[j]);
            top = fmaxf(top, fmaxf(low(v[j]), high(v[j])));
        }
    }
    for (int other = 16; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, other));
    if (lane == 0) partial[0][warp] = top;
    __syncthreads();
    for (int i = 0; i < SOFTMAX_THREADS / 32; i++) top = fmaxf(top, partial[0][i]);
#pragma unroll
    for (int i = 0; i < CHUNKS_OF_ROW; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) total += values[i][j] = __expf(values[i][j] - top);
    }
    for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, other);
    if (lane == 0) partial[1][warp] = total;
    __syncthreads();
    total = 0.0f;
    for (int i = 0; i < SOFTMAX_THREADS / 32; i++) total += partial[1][i];
    const float factor = 1.0f / total;
#pragma unroll
    for (int i = 0; i < CHUNKS_OF_ROW; i++) {
        const int at = threadIdx.x + i * SOFTMAX_THREADS;
        const float* v = values[i];
        if (at < width / 8)
            row[at] = make_uint4(pack(v[0] * factor, v[1] * factor), pack(v[2] * factor, v[3] * factor),
                                 pack(v[4] * factor, v[5] * factor), pack(v[6] * factor, v[7] * factor));
    }
}
