// Instructions that this processor may lack: AMX and AVX-VNNI, computed when it refuses them.
//
// Linked into the kernels that tests build (native_kernels.py), so that their own machine code runs on every machine. Written
// from the operation sections of Intel's manual, volume 2, not from the kernels. Where the processor has an instruction, it
// computes it. What is not known here, or what the unit's configuration forbids, dies as it would without.

#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

namespace {

struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

struct Unit {
    Configuration set;
    uint8_t tiles[8][16][64];
};
thread_local Unit unit;

// A three-byte VEX instruction of map 0F38: `reg` and `second` are registers, the third operand a register or memory.
struct Instruction {
    int opcode, prefix, reg, second, third, length;
    bool wide, memory;
    uint8_t *base;    // with displacement
    int64_t index;    // scaled
};

enum { NONE, P66, PF3, PF2 };

int64_t general(const greg_t *registers, int number) {
    constexpr int PLACES[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[PLACES[number]];
}

bool decode(const uint8_t *p, const greg_t *registers, Instruction &i) {
    if (p[0] != 0xc4 || (p[1] & 31) != 2) return false;
    const int r = p[1] & 128 ? 0 : 8, x = p[1] & 64 ? 0 : 8, b = p[1] & 32 ? 0 : 8;
    const int mode = p[4] >> 6, rm = p[4] & 7;
    i = {p[3], p[2] & 3, (p[4] >> 3 & 7) + r, ~p[2] >> 3 & 15, rm + b, 5, (p[2] & 4) != 0, mode != 3, nullptr, 0};
    if (!i.memory) return true;
    int64_t base = 0;
    bool far = mode == 2;  // a displacement of 32 bits
    if (rm == 4) {
        const int sib = p[i.length++], index = (sib >> 3 & 7) + x;
        if (index != 4) i.index = general(registers, index) * (1 << (sib >> 6));
        if ((sib & 7) == 5 && mode == 0) far = true;
        else base = general(registers, (sib & 7) + b);
    } else if (rm == 5 && mode == 0) {
        far = true;
        base = int64_t(p) + i.length + 4;
    } else {
        base = general(registers, rm + b);
    }
    if (far) {
        int32_t displacement;
        memcpy(&displacement, p + i.length, 4);
        base += displacement;
        i.length += 4;
    } else if (mode == 1) {
        base += int8_t(p[i.length++]);
    }
    i.base = reinterpret_cast<uint8_t *>(base);
    return true;
}

// AVX-VNNI: registers lie in the signal's frame, as XSAVE writes them.

struct Vectors {
    uint8_t *frame;
    void read(int number, uint8_t out[32]) const {
        memcpy(out, frame + 160 + 16 * number, 16);
        memcpy(out + 16, frame + 576 + 16 * number, 16);
    }
    void write(int number, const uint8_t in[32]) const {
        memcpy(frame + 160 + 16 * number, in, 16);
        memcpy(frame + 576 + 16 * number, in + 16, 16);
        frame[512] |= 6;  // both are in use
    }
};

bool dot(const Instruction &i, const Vectors &vectors) {
    uint8_t sums[32], a[32], b[32];
    const int size = i.wide ? 32 : 16;
    vectors.read(i.reg, sums);
    vectors.read(i.second, a);
    if (i.memory) memcpy(b, i.base + i.index, size);
    else vectors.read(i.third, b);
    memset(sums + size, 0, 32 - size);
    for (int lane = 0; lane < size; lane += 4) {
        uint32_t sum;
        memcpy(&sum, sums + lane, 4);
        if (i.opcode == 0x50) {  // VPDPBUSD: unsigned bytes times signed ones
            for (int k = 0; k < 4; k++) sum += a[lane + k] * int8_t(b[lane + k]);
        } else {  // VPDPWSSD: signed words
            int16_t v[2], w[2];
            memcpy(v, a + lane, 4);
            memcpy(w, b + lane, 4);
            for (int k = 0; k < 2; k++) sum += int32_t(v[k]) * w[k];
        }
        memcpy(sums + lane, &sum, 4);
    }
    vectors.write(i.reg, sums);
    return true;
}

// AMX

bool configure(const Configuration &wanted) {
    static const Configuration zero{};
    if (wanted.palette > 1 || wanted.start_row || memcmp(wanted.reserved, zero.reserved, 14)) return false;
    for (int t = 0; t < 16; t++)
        if (wanted.rows[t] > (t < 8 ? 16 : 0) || wanted.row_bytes[t] > (t < 8 ? 64 : 0)) return false;
    unit = {};
    if (wanted.palette) unit.set = wanted;
    return true;
}

bool usable(int tile) { return tile < 8 && unit.set.palette && unit.set.rows[tile] && unit.set.row_bytes[tile]; }

bool load(const Instruction &i) {
    if (!usable(i.reg)) return false;
    memset(unit.tiles[i.reg], 0, sizeof unit.tiles[i.reg]);
    for (int row = 0; row < unit.set.rows[i.reg]; row++)
        memcpy(unit.tiles[i.reg][row], i.base + row * i.index, unit.set.row_bytes[i.reg]);
    return true;
}

bool store(const Instruction &i) {
    if (!usable(i.reg)) return false;
    for (int row = 0; row < unit.set.rows[i.reg]; row++)
        memcpy(i.base + row * i.index, unit.tiles[i.reg][row], unit.set.row_bytes[i.reg]);
    return true;
}

float wide(const uint8_t *p) {
    const uint32_t bits = uint32_t(p[1]) << 24 | uint32_t(p[0]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// TDPBF16PS and TDPBSSD: the first operand gets the second times the third
bool multiply(const Instruction &i) {
    const int c = i.reg, a = i.third, b = i.second;  // VEX.vvvv is the last operand, ModRM.rm the middle one
    if (!usable(a) || !usable(b) || !usable(c) || a == b || b == c || a == c) return false;
    const int rows = unit.set.rows[c], columns = unit.set.row_bytes[c] / 4, inner = unit.set.row_bytes[a] / 4;
    if (rows != unit.set.rows[a] || unit.set.row_bytes[b] != 4 * columns || unit.set.rows[b] != inner) return false;
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            uint8_t *out = unit.tiles[c][m] + 4 * n;
            if (i.opcode == 0x5c) {
                float even = 0, odd = 0, sum;
                for (int k = 0; k < inner; k++) {
                    const uint8_t *x = unit.tiles[a][m] + 4 * k, *y = unit.tiles[b][k] + 4 * n;
                    even = fmaf(wide(x), wide(y), even);
                    odd = fmaf(wide(x + 2), wide(y + 2), odd);
                }
                memcpy(&sum, out, 4);
                sum += even + odd;
                memcpy(out, &sum, 4);
            } else {
                uint32_t sum;
                memcpy(&sum, out, 4);
                for (int k = 0; k < inner; k++)
                    for (int byte = 0; byte < 4; byte++)
                        sum += int8_t(unit.tiles[a][m][4 * k + byte]) * int8_t(unit.tiles[b][k][4 * n + byte]);
                memcpy(out, &sum, 4);
            }
        }
    return true;
}

bool compute(const Instruction &i, const Vectors &vectors) {
    if ((i.opcode == 0x50 || i.opcode == 0x52) && i.prefix == P66) return dot(i, vectors);
    if (i.wide) return false;
    switch (i.opcode << 4 | i.prefix << 1 | i.memory) {
        case 0x490 | NONE << 1 | 1: {  // LDTILECFG
            Configuration wanted;
            memcpy(&wanted, i.base + i.index, sizeof wanted);
            return configure(wanted);
        }
        case 0x490 | P66 << 1 | 1: memcpy(i.base + i.index, &unit.set, sizeof unit.set); return true;  // STTILECFG
        case 0x490 | NONE << 1: unit = {}; return true;                                                // TILERELEASE
        case 0x490 | PF2 << 1:                                                                         // TILEZERO
            if (!usable(i.reg)) return false;
            memset(unit.tiles[i.reg], 0, sizeof unit.tiles[i.reg]);
            return true;
        case 0x4b0 | PF2 << 1 | 1: return load(i);     // TILELOADD
        case 0x4b0 | PF3 << 1 | 1: return store(i);    // TILESTORED
        case 0x5c0 | PF3 << 1: return multiply(i);     // TDPBF16PS
        case 0x5e0 | PF2 << 1: return multiply(i);     // TDPBSSD
    }
    return false;
}

struct sigaction before;

void refused(int, siginfo_t *, void *context) {
    mcontext_t &machine = static_cast<ucontext_t *>(context)->uc_mcontext;
    Instruction i;
    const uint8_t *at = reinterpret_cast<const uint8_t *>(machine.gregs[REG_RIP]);
    if (decode(at, machine.gregs, i) && compute(i, {reinterpret_cast<uint8_t *>(machine.fpregs)}))
        machine.gregs[REG_RIP] += i.length;
    else sigaction(SIGILL, &before, nullptr);  // it is tried again, and goes there
}

__attribute__((constructor)) void install() {
    struct sigaction action {};
    action.sa_sigaction = refused;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before);
}

Configuration others(int palette) {
    Configuration c{};
    c.palette = palette;
    c.rows[0] = 3 * palette, c.row_bytes[0] = 32 * palette;
    return c;
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Tell this thread's matrix unit something (palette 1) or nothing (0), as others do.
EXPORT void test_configure_tiles(int palette) {
    const Configuration wanted = others(palette);
    if (palette) __asm__ volatile("ldtilecfg %0" ::"m"(wanted) : "memory");
    else __asm__ volatile("tilerelease" ::: "memory");
}

EXPORT int test_tiles_are_configured(int palette) {
    const Configuration wanted = others(palette);
    Configuration found;
    __asm__ volatile("sttilecfg %0" : "=m"(found)::"memory");
    return !memcmp(&wanted, &found, sizeof found);
}
}
