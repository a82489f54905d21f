"""PTX text to a program."""

from __future__ import annotations

import re

from ptx._asynchronous import Compiler
from ptx._operands import split
from ptx._program import Instruction, Program, Scope
from ptx._values import DTYPES, SHARED_BASE


def parse(ptx: str) -> Program:
    """Compile the first kernel of a PTX file."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # keeps the line numbers
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(loc|file|section)\b[^\n]*", blank, ptx, flags=re.S | re.M)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx)
    if entry is None:
        raise NotImplementedError("a PTX file without an .entry")
    if re.search(r"\.(global|const)\s[^;]*;", ptx[: entry.start()]):
        raise NotImplementedError("module-scope .global or .const variables")
    threads = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", entry[3])
    if threads is None:
        raise NotImplementedError("a kernel without .maxntid or .reqntid")
    parameters: dict[str, tuple[int, int]] = {}
    end = 0
    for declaration in split(entry[2]):
        words = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([bus]\d+|f\d+)\s.*?([\w$]+)(?:\[(\d+)\])?$", declaration, re.S
        )
        if words is None:
            raise NotImplementedError(declaration)
        size = DTYPES[words[2]].itemsize
        align = int(words[1] or size)
        end = -(-end // align) * align
        parameters[words[3]] = (end, size * int(words[4] or 1))
        end += parameters[words[3]][1]
    x, y, z = (int(extent or 1) for extent in threads.groups())
    program = Program(entry[1], (x, y, z), parameters)
    dynamic = re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)(?:\[\])?\s*;", ptx[: entry.start()])
    scope, branches, position = Scope(), [], entry.end()
    statement = re.compile(r"\s*(?:([{}])|([A-Za-z_$%][\w$]*)\s*:(?!:)|([^;]*);)")
    compiled: list[Compiler] = []
    while match := statement.match(ptx, position):
        position = match.end()
        if match[1] == "{":
            scope = Scope(scope)
        elif match[1] == "}":
            if scope.parent is None:
                break
            scope = scope.parent
        elif match[2]:
            scope.labels[match[2]] = len(program.instructions)
        elif match[3].startswith(".reg"):
            _, kind, names = match[3].split(None, 2)
            for name in split(names):
                numbered = re.fullmatch(r"(.*)<(\d+)>", name)
                for each in [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [name]:
                    scope.registers[each] = (len(program.registers), DTYPES[kind[1:].replace("f", "b")])
                    program.registers.append(each)
        elif match[3].startswith(".shared"):
            words = re.match(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?$", match[3])
            if words is None:
                raise NotImplementedError(match[3])
            if words[4]:
                start = -(-program.static_bytes // int(words[1] or 1)) * int(words[1] or 1)
                program.symbols[words[3]] = SHARED_BASE + start
                program.static_bytes = start + DTYPES[words[2]].itemsize * int(words[4])
            else:
                dynamic.append(words[3])
        elif match[3].startswith(".pragma"):
            continue
        else:
            program.static_bytes = -(-program.static_bytes // 1024) * 1024
            program.symbols |= {name: SHARED_BASE + program.static_bytes for name in dynamic}
            text = " ".join(match[3].split())
            instruction = Instruction(ptx.count("\n", 0, match.start(3)) + 1, text)
            program.instructions.append(instruction)
            compiled.append(Compiler(program, scope, instruction))
            if (target := compiled[-1].compile()) is not None:
                branches.append((instruction, target, scope))
    for instruction, target, scope in branches:
        instruction.branch = scope.find("labels", target)
        if instruction.branch is None:
            raise NotImplementedError(f"an unknown label in {instruction}")
    program.instructions.append(Instruction(0, "(end of the kernel)", leaves=True))
    used = frozenset(r for i in program.instructions if i.product for r in (*i.product[2], *i.product[3]))
    for instruction in program.instructions:
        instruction.unfences = frozenset() if instruction.product else instruction.written & used
    return program
