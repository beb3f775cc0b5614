"""The frame of report pages: light and dark, screen and phone, nothing from outside."""

from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fafbfc; --ink: #17212b; --soft: #5b6874; --faint: #a9b3bd; --line: #e2e7ec;
  --good: #11774c; --wash: #eaf5ef; --bad: #b23c26;
  --c0: #2566cf; --c1: #b35c0c; --c2: #0b827e; --c3: #a93a8b; --c4: #6a4fd0; --c5: #66740f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11161c; --ink: #e7ecf1; --soft: #9aa6b2; --faint: #5d6975; --line: #29323c;
    --good: #55c78f; --wash: #14281f; --bad: #f28d74;
    --c0: #7caefc; --c1: #eba55c; --c2: #48c5bd; --c3: #e68fca; --c4: #b0a1f7; --c5: #b9c85e;
  }
}
.m0 { --m: var(--c0) } .m1 { --m: var(--c1) } .m2 { --m: var(--c2) }
.m3 { --m: var(--c3) } .m4 { --m: var(--c4) } .m5 { --m: var(--c5) } .mt { --m: var(--soft) }

* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1120px; margin: 0 auto; padding: 72px 32px 96px }
h1 { margin: 0 0 20px; font-size: 42px; line-height: 1.12; font-weight: 650;
  letter-spacing: -.022em; max-width: 24em; text-wrap: balance }
h2 { margin: 0 0 12px; font-size: 25px; line-height: 1.25; font-weight: 650;
  letter-spacing: -.014em }
h3 { margin: 0; font-size: 16px; font-weight: 650 }
p { margin: 0 0 12px; max-width: 68ch; text-wrap: pretty }
section { margin-top: 88px }
.intro { font-size: 18px; color: var(--soft) }
.note { color: var(--soft) }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }

.glance { display: grid; grid-template-columns: minmax(300px, 4fr) minmax(0, 7fr); gap: 56px;
  align-items: start; margin-top: 48px }
.glance h2 { font-size: 16px; line-height: 1.5; letter-spacing: 0; margin: 0 0 4px }
.best { list-style: none; margin: 16px 0 0; padding: 0 }
.best li { display: grid; grid-template-columns: 76px 1fr; column-gap: 16px; padding: 18px 0;
  border-top: 1px solid var(--line) }
.best .budget { padding-top: 9px }
.budget { color: var(--soft); font-size: 14px; line-height: 1.3 }
.squares { display: block; fill: var(--ink); margin-bottom: 7px }
.times { font-size: 40px; line-height: 1.05; font-weight: 650; letter-spacing: -.03em;
  margin-bottom: 6px }
.good .times { color: var(--good) }
.small { font-size: 14px; line-height: 1.5; color: var(--soft) }
.small b { color: var(--ink); font-weight: 600 }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  background: var(--m); margin-right: 9px }
td .key { white-space: nowrap }
.mt.key::before { background: none; border: 2px solid var(--m) }

svg.chart { display: block; width: 100%; height: auto; overflow: visible }
.chart text { font-size: 12px; fill: var(--soft); paint-order: stroke; stroke: var(--page);
  stroke-width: 4px; stroke-linejoin: round }
.chart .name { font-weight: 600; fill: var(--m) }
.chart .name.teacher { font-weight: 500; fill: var(--soft) }
.chart .value { font-weight: 650; fill: var(--ink); font-size: 13px }
.chart line, .chart path { fill: none; stroke-width: 1; vector-effect: non-scaling-stroke }
.chart .band { fill: var(--good); stroke: none; opacity: .13 }
.chart .rule { stroke: var(--line) }
.chart .axis, .chart .mark { stroke: var(--faint) }
.chart .dashed { stroke: var(--soft); stroke-width: 1.25; stroke-dasharray: 5 4 }
.chart .line { stroke: var(--m); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.chart .raw { stroke: var(--m); opacity: .28 }
.chart .dot { fill: var(--m); stroke: var(--page); stroke-width: 1.5 }
.chart .mt .line { stroke-width: 1.5 }
.narrow { display: none }

table { width: 100%; border-collapse: collapse; margin-top: 28px; font-size: 15px }
thead th { font-weight: 500; font-size: 13.5px; line-height: 1.35; color: var(--soft);
  vertical-align: bottom; white-space: nowrap; padding: 0 10px 10px; text-align: right }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
th:last-child, td:last-child { padding-right: 0 }
td { padding: 10px; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line) }
td small { color: var(--soft); font-size: 13px }
tbody th { text-align: left; font-weight: 600; padding: 36px 0 12px }
tbody th .squares { display: inline-block; margin: 0 12px 0 0; vertical-align: middle }
tr.teacher td { color: var(--soft) }
tr.better td { background: var(--wash) }
tr.better td:first-child { box-shadow: -14px 0 0 var(--wash) }
tr.better td:last-child { box-shadow: 14px 0 0 var(--wash) }
td.method { font-weight: 600; white-space: normal }
td.method div { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 10px }
td.method small { font-weight: 400; overflow-wrap: anywhere }
td.fd { font-weight: 600 }
.mark { color: var(--good); font-size: 13px; font-weight: 600; white-space: nowrap }
.worse { color: var(--bad); font-weight: 600 }
td small.worse { color: var(--bad) }
.withbar { display: inline-flex; align-items: center; gap: 12px }
.bar { position: relative; display: inline-block; width: 112px; height: 10px }
.bar i { position: absolute; left: 0; top: 0; bottom: 0; background: var(--m); border-radius: 1px;
  opacity: .85 }
.bar i.cut { -webkit-mask: linear-gradient(90deg, #000 60%, transparent);
  mask: linear-gradient(90deg, #000 60%, transparent) }
.bar u { position: absolute; top: -4px; bottom: -4px; width: 1px; background: var(--ink);
  opacity: .6 }
.bar.off { width: 56px; height: 8px }
.withbar > span:last-child { min-width: 3.8em }

.grids { display: flex; flex-wrap: wrap; gap: 44px 56px; margin-top: 32px }
figure { margin: 0 }
.grids figure { min-width: 180px; max-width: 280px }
.grids img { display: block; max-width: 100%; height: auto; border-radius: 3px }
.grids .small { image-rendering: pixelated }
.grids figcaption { margin-top: 12px }
.grids figcaption span { display: block; font-size: 14px; line-height: 1.45; color: var(--soft) }

.run { display: grid; grid-template-columns: 128px minmax(0, 1fr) minmax(0, 1fr); gap: 32px;
  padding: 28px 0 24px; border-top: 1px solid var(--line) }
.runs { margin-top: 28px }
.run figcaption { font-size: 14px; color: var(--soft) }

.health .run { grid-template-columns: minmax(0, 5fr) minmax(0, 4fr) }
.state { font-weight: 600; margin: 6px 0 8px } .state.good { color: var(--good) }
.state.bad { color: var(--bad) } .health p { font-size: 15px }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 40px }

.proofs { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 3fr); gap: 56px;
  align-items: start; margin-top: 44px }
.proofs.whole { display: block }
.proofs h2 { font-size: 16px; letter-spacing: 0; margin: 0 }
.proofs .small { margin-bottom: 14px }
h2.key::before { width: 12px; height: 12px; vertical-align: .1em }
h1.worse { color: var(--bad); font-weight: 650 }
a { color: inherit; text-decoration-color: var(--faint); text-underline-offset: 3px }
.lines { display: grid; gap: 22px 48px; margin-top: 14px; align-items: start }
.whole .lines { grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)) }
.lines a { text-decoration: none }
.lines a:hover { text-decoration: underline }
.lines ul { list-style: none; margin: 4px 0 0; padding: 0; font-size: 14px; color: var(--soft) }
.lines li { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center;
  gap: 0 12px }
.verdicts { flex: none } .verdicts .holds { fill: var(--good); opacity: .75 }
.verdicts .short { fill: var(--bad) }
.case { display: grid; grid-template-columns: minmax(0, 10fr) minmax(0, 11fr); gap: 20px 48px;
  border-top: 1px solid var(--line); padding: 26px 0 36px; align-items: start }
section > .state { margin-bottom: 28px }
.case > header, .case > :nth-child(2):last-child { grid-column: 1 / -1 }
.case > :last-child { max-width: 640px }
.case > header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 20px }
.case .state { margin: 0 } .case .note { font-size: 14px; margin-top: 14px }
.clouds { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 20px 24px }
.clouds figcaption { font-size: 13.5px; line-height: 1.4; color: var(--soft); margin-top: 6px }
.clouds figure:only-child { grid-column: 1 / -1; max-width: 290px }
.cloud .bars { fill: var(--m); opacity: .38 }
.cloud .theory { stroke: var(--ink); stroke-width: 1.5; opacity: .7; stroke-linejoin: round }
.cloud .quiet, .cloud .mine { stroke-linecap: round }
.cloud .way { stroke: var(--m); stroke-width: 1; opacity: .75; stroke-linejoin: round }
.cloud .theirs { stroke: var(--faint); stroke-width: 1; stroke-linejoin: round }
.cloud .quiet { stroke: var(--faint); stroke-width: 3.2; opacity: .75 }
.cloud .mine { stroke: var(--m); stroke-width: 2.6; opacity: .8 }
.cloud .gaps { stroke: var(--ink); stroke-width: .8; opacity: .45 }
.proof { font-size: 14px; margin-top: 0 }
.proof td { padding: 4px 8px } .proof thead th { padding: 0 8px 6px; font-size: 13px }
.proof tbody th { padding: 16px 0 5px }
.proof td:first-child, .proof th:first-child { padding-left: 0 }
.proof td:last-child, .proof th:last-child { padding-right: 0 }
.proof .quantity { white-space: normal; position: relative }
.proof small { white-space: nowrap; font-weight: 400 }
.proof .verdict { font-weight: 600; color: var(--good) }
.proof .short td { color: var(--bad); font-weight: 600 }
.proof .short .quantity::before { content: ""; position: absolute; left: -12px; top: 0; bottom: 0;
  width: 3px; background: var(--bad) }
.proof .verdict small { color: inherit; margin-left: 8px }

dl { display: grid; grid-template-columns: minmax(120px, max-content) minmax(0, 1fr);
  gap: 0 36px; margin: 24px 0 0; font-size: 15px }
dt, dd { margin: 0; padding: 10px 0; border-top: 1px solid var(--line) }
dt { color: var(--soft) }
dd { overflow-wrap: anywhere; white-space: pre-wrap }

@media (max-width: 1140px) {
  .mark { flex-basis: 100% }
  .bar { width: 72px }
  .bar.off { display: none }
  td, thead th { padding-left: 7px; padding-right: 7px }
}
@media (max-width: 860px) {
  main { padding: 44px 20px 64px }
  h1 { font-size: 31px }
  .intro { font-size: 17px }
  section { margin-top: 68px }
  .glance { grid-template-columns: minmax(0, 1fr); gap: 36px; margin-top: 36px }
  .wide { display: none } .narrow { display: block }
  .run, .health .run, .pair { grid-template-columns: minmax(0, 1fr); gap: 18px }
  .run { padding: 26px 0 }
  .grids { display: grid; grid-template-columns: 1fr 1fr; gap: 30px 20px }
  .grids figure { min-width: 0 }
  .grids h3 { font-size: 15px }
  dl { grid-template-columns: minmax(0, 1fr) }
  dd { border: 0; padding-top: 0 } dt { padding-bottom: 2px }

  table, tbody, tr, td, th { display: block }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  tbody th { padding: 36px 0 10px }
  tbody tr:not(.group) { display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 14px 0;
    border-top: 1px solid var(--line); align-items: baseline }
  tr.better { background: var(--wash); margin: 0 -12px; padding-left: 12px !important;
    padding-right: 12px !important }
  td, td:first-child { border: 0; padding: 0; text-align: left; background: none !important }
  td.method { flex: 1 1 0 } td.fd { text-align: right }
  td.ratio { flex: 1 0 100%; margin: 2px 0 4px }
  td.ratio .withbar { display: flex } td.ratio .bar { flex: 1 }
  td.ratio .withbar > span:last-child { text-align: right }
  td[data-label]:not(.ratio)::before { content: attr(data-label) " "; color: var(--soft);
    font-weight: 400; font-size: 13px }
  td:not(.method):not(.fd):not(.ratio) { font-size: 13.5px }
  td:nth-child(5), td:nth-child(6) { order: 1 }
  td.blank { display: none !important }
  .proofs, .case { grid-template-columns: minmax(0, 1fr) }
  .proof tbody tr:not(.group) { padding: 7px 0; gap: 0 12px }
  .proof td, .proof td:first-child { padding: 0 }
  .proof td[data-label] { order: 2 }
  .proof td.quantity { flex: 1 1 calc(100% - 158px); font-size: 14px !important; min-width: 0 }
  .proof td.verdict { order: 1 !important; text-align: right; flex: 0 0 140px }
  .cloud text { font-size: 15px } .clouds { gap: 20px }
  .clouds figure:only-child .cloud text { font-size: 12px }
  .withbar > span:last-child { min-width: 0 }
}
"""


def html_page(title: str, body: str) -> str:
    """A whole page around the content of its ``main``."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )
