"""What shows the numbers of a run as it goes, beside its record: wandb and TensorBoard.

Both are conveniences: whatever one of them raises is one warning, and the run goes on without it. Neither is imported
before it is asked for.
"""

import os

from run import records

NAMES = ('wandb', 'tensorboard')


def names_of_trackers(settings):
    """What log_to and wandb_log ask for. ValueError for another name, and for an artefact without wandb."""
    names = {name.strip() for name in settings['log_to'].split(',')} - {''}
    if names - set(NAMES):
        raise ValueError(f'log_to={settings["log_to"]!r}: expected any of {", ".join(NAMES)} joined by commas')
    if settings['wandb_log']:
        names.add('wandb')
    if settings['wandb_artifact'] and 'wandb' not in names:
        raise ValueError('wandb_artifact=True does nothing without wandb: add --wandb_log=True')
    return names


class Trackers:
    """Those of a run with this record (run.json) and log, by its first process. An evaluation alone (out_dir is None)
    leaves no files, so that it has wandb's numbers at most.
    """

    def __init__(self, out_dir, record, log, say):
        self.out_dir, self.record, self.log, self.say = out_dir, record, log, say
        self.settings = record['config']
        earlier = {} if out_dir is None or record['resumed_at'] is None else records.read_record(out_dir)
        if 'wandb_id' in earlier:
            record['wandb_id'] = earlier['wandb_id']
        self.names = names_of_trackers(self.settings)  # without those that have failed
        self.next_step = 0  # the first that TensorBoard has no point of from this process
        self.writer = None

    def show(self):
        """Show the last line of the log."""
        self.attempt('wandb', self.log_to_wandb)
        if self.out_dir is not None:
            self.attempt('tensorboard', self.write_points)

    def finish(self):
        """The run has ended well, and best.pt is what it came to."""
        if self.settings['wandb_artifact'] and self.out_dir is not None:
            self.attempt('wandb', self.upload_best)

    def attempt(self, name, function):
        if name not in self.names:
            return
        try:
            function()
        except Exception as error:  # any at all, of a package that the run does not need
            self.names.remove(name)
            self.say(f'warning: no {name} from here on: {type(error).__name__}: {error}')

    def join_wandb(self):
        """The module wandb, with a run under way. That of a resumed run goes on, by the id in the record."""
        import wandb

        if wandb.run is None:
            name = self.settings['wandb_run_name'] or self.settings['out_dir']
            run = dict(project=self.settings['wandb_project'], name=name, config=self.settings)
            if 'wandb_id' in self.record:
                run.update(id=self.record['wandb_id'], resume='allow')
            wandb.init(settings={'login_timeout': 30}, **run)
        self.record['wandb_id'] = wandb.run.id
        return wandb

    def log_to_wandb(self):
        self.join_wandb().log(self.log[-1])

    def upload_best(self):
        wandb = self.join_wandb()
        artifact = wandb.Artifact(f'model-{wandb.run.id}', type='model')
        artifact.add_file(os.path.join(self.out_dir, 'best.pt'))
        wandb.log_artifact(artifact)

    def write_points(self):
        """A point for each number of the new lines. A resumed run writes those of all lines again."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard drops the points from this step on: the log has all that still count
            self.writer = SummaryWriter(os.path.join(self.out_dir, 'tensorboard'), purge_step=0)
        for line in self.log:
            if line['iter'] >= self.next_step:
                numbers = {name: value for name, value in line.items() if name != 'iter' and value is not None}
                for name, value in numbers.items():
                    self.writer.add_scalar(name, value, line['iter'])
        self.next_step = self.log[-1]['iter'] + 1
        self.writer.flush()
